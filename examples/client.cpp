// A prompt or token ids to a WAV on MNN's session API, for a post-trained model: what an app has to do, in its order.
//
//     c++ -std=c++17 -O2 client.cpp -I$MNN_HOME/include -L$MNN_HOME/lib -lMNN -o client
//     ./client TEXT_ENCODER NUMBER_CONDITIONER DIT DECODER out.wav TOKENIZER_TABLE 0.5 7 "warm analog pad"
//     ./client TEXT_ENCODER NUMBER_CONDITIONER DIT DECODER out.wav 335,358,74,347 0.5 7
//
// The files are those that contract.json names, the two numbers seconds and seed. Widths are read from the models;
// the constants below are those of contract.json for the small family. The samples are those of `sa3-convert run`.

#include <MNN/Interpreter.hpp>

#include "token_table.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

constexpr int kSampleRate = 44100, kSamplesPerLatent = 4096, kAlign = 2, kMaxSamples = 5292032, kSteps = 8;
constexpr int kContextLeft = 2, kContextRight = 2, kAtMost = 128;
constexpr double kPaddingSeconds = 6.0;
constexpr float kLogsnrAt0 = 2.0f, kLogsnrSpan = 8.2f;

using Floats = std::vector<float>;
using Shape = std::vector<int>;

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "client: %s\n", what.c_str());
    std::exit(1);
}

// A model; lengths may change from run to run.
class Model {
public:
    explicit Model(const char* path) : interpreter_(MNN::Interpreter::createFromFile(path)) {
        if (!interpreter_) fail(std::string("cannot load ") + path);
        MNN::ScheduleConfig config;
        MNN::BackendConfig backend;
        backend.precision = MNN::BackendConfig::Precision_High;
        config.numThread = 4;
        config.backendConfig = &backend;
        session_ = interpreter_->createSession(config);
        if (!session_) fail(std::string("cannot run ") + path);
    }

    Shape shape(const char* input) { return tensor(input)->shape(); }

    void resize(const char* input, const Shape& shape) { interpreter_->resizeTensor(tensor(input), shape); }
    void resized() { interpreter_->resizeSession(session_); }

    template <typename T>
    void set(const char* input, const std::vector<T>& values) {
        MNN::Tensor* device = tensor(input);
        MNN::Tensor host(device, MNN::Tensor::CAFFE);
        if (host.elementSize() != static_cast<int>(values.size())) fail(std::string("wrong length of ") + input);
        std::memcpy(host.host<T>(), values.data(), values.size() * sizeof(T));
        device->copyFromHostTensor(&host);
    }

    Floats run(const char* output) {
        if (interpreter_->runSession(session_) != MNN::NO_ERROR) fail("a model failed");
        MNN::Tensor* device = interpreter_->getSessionOutput(session_, output);
        if (!device) fail(std::string("there is no output ") + output);
        MNN::Tensor host(device, MNN::Tensor::CAFFE);
        device->copyToHostTensor(&host);
        return Floats(host.host<float>(), host.host<float>() + host.elementSize());
    }

private:
    MNN::Tensor* tensor(const char* input) {
        MNN::Tensor* found = interpreter_->getSessionInput(session_, input);
        if (!found) fail(std::string("there is no input ") + input);
        return found;
    }

    std::unique_ptr<MNN::Interpreter> interpreter_;
    MNN::Session* session_ = nullptr;
};

// Standard normal numbers: contract.json, `noise`.
class Noise {
public:
    explicit Noise(uint64_t seed) : draws_(static_cast<uint32_t>(seed)) {}

    Floats draw(size_t size) {
        Floats values(size);
        for (float& value : values) value = static_cast<float>(draws_() & 0xFFFFFF) * 0x1p-24f;
        for (size_t start = 0; start + 16 <= size; start += 16) normals(&values[start]);
        if (size % 16 != 0) {
            float* last = &values[size - 16];
            for (int i = 0; i < 16; ++i) last[i] = static_cast<float>(draws_() & 0xFFFFFF) * 0x1p-24f;
            normals(last);
        }
        return values;
    }

private:
    static void normals(float* block) {
        for (int i = 0; i < 8; ++i) {
            const float radius = std::sqrt(-2.0f * std::log(1.0f - block[i]));
            const float angle = static_cast<float>(2.0 * M_PI) * block[i + 8];
            block[i] = radius * std::cos(angle);
            block[i + 8] = radius * std::sin(angle);
        }
    }

    std::mt19937 draws_;
};

Floats sigmas() {
    Floats values(kSteps + 1);
    for (int i = 0; i <= kSteps; ++i) {
        const float u = static_cast<float>(1.0 - static_cast<double>(i) / kSteps);
        values[i] = 1.0f / (1.0f + std::exp(kLogsnrAt0 - kLogsnrSpan * u));
    }
    values.front() = 1.0f;
    values.back() = 0.0f;
    return values;
}

// Latents [first, last) of x [channels, latents]; beyond the end they are zero.
Floats part(const Floats& x, int channels, int latents, int first, int last) {
    Floats cut(static_cast<size_t>(channels) * (last - first), 0.0f);
    for (int c = 0; c < channels; ++c)
        for (int t = first; t < std::min(last, latents); ++t) cut[c * (last - first) + t - first] = x[c * latents + t];
    return cut;
}

void write_wav(const char* path, const Floats& left, const Floats& right) {
    std::FILE* file = std::fopen(path, "wb");
    if (!file) fail(std::string("cannot write ") + path);
    const uint32_t bytes = static_cast<uint32_t>(left.size()) * 4;
    const auto put32 = [file](uint32_t value) { std::fwrite(&value, 4, 1, file); };
    const auto put16 = [file](uint16_t value) { std::fwrite(&value, 2, 1, file); };
    std::fwrite("RIFF", 1, 4, file), put32(36 + bytes), std::fwrite("WAVEfmt ", 1, 8, file), put32(16);
    put16(1), put16(2), put32(kSampleRate), put32(kSampleRate * 4), put16(4), put16(16);
    std::fwrite("data", 1, 4, file), put32(bytes);
    for (size_t i = 0; i < left.size(); ++i)
        for (const float sample : {left[i], right[i]})
            put16(static_cast<uint16_t>(std::lrint(std::clamp(sample, -1.0f, 1.0f) * 32767.0f)));
    if (std::fclose(file) != 0) fail(std::string("cannot write ") + path);
}

std::vector<int> listed(const char* text) {
    std::vector<int> ids;
    std::stringstream words(text);
    for (std::string word; std::getline(words, word, ',');) ids.push_back(std::atoi(word.c_str()));
    return ids;
}

std::vector<int> encoded(const char* table, const char* prompt) {
    try {
        return TokenTable(table).encode(prompt);
    } catch (const std::runtime_error& error) {
        fail(error.what());
    }
}

int main(int count, char** given) {
    if (count != 9 && count != 10) fail("give four models, a WAV, token ids or a table, seconds, a seed and a prompt");
    const std::vector<int> tokens = count == 10 ? encoded(given[6], given[9]) : listed(given[6]);
    const double seconds = std::atof(given[7]);

    // Lengths: of the output, of the latents, and of those that count.
    const int samples = static_cast<int>(seconds * kSampleRate);
    const auto rounded_up = [](int value, int to) { return (value + to - 1) / to; };
    int latents = rounded_up(static_cast<int>((seconds + kPaddingSeconds) * kSampleRate), kSamplesPerLatent);
    latents = std::min(rounded_up(latents, kAlign) * kAlign, kMaxSamples / kSamplesPerLatent);
    const int wanted = rounded_up(samples, kSamplesPerLatent);
    const int valid = std::min(wanted + static_cast<int>(kPaddingSeconds * kSampleRate / kSamplesPerLatent), latents);

    // Conditioning. Each model is gone before the next one is loaded.
    Floats condition, global;
    {
        Model text(given[1]);
        std::vector<int> ids = tokens, mask(text.shape("input_ids")[1], 0);
        std::fill(mask.begin(), mask.begin() + std::min(ids.size(), mask.size()), 1);
        ids.resize(mask.size(), 0);
        text.set("input_ids", ids);
        text.set("attention_mask", mask);
        condition = text.run("last_hidden_state");
    }
    {
        Model number(given[2]);
        number.set("seconds", Floats{static_cast<float>(seconds)});
        global = number.run("embedding");
    }
    condition.insert(condition.end(), global.begin(), global.end());

    // Denoising, in ping-pong steps.
    Floats x;
    int channels = 0;
    {
        Model dit(given[3]);
        channels = dit.shape("x")[1];
        dit.resize("x", {1, channels, latents});
        dit.resize("local_add_cond", {1, channels + 1, latents});
        dit.resize("padding_mask", {1, latents});
        dit.resized();
        Floats mask(latents, 0.0f);
        std::fill(mask.begin(), mask.begin() + valid, 1.0f);
        Noise noise(std::strtoull(given[8], nullptr, 10));
        x = noise.draw(static_cast<size_t>(channels) * latents);
        const Floats times = sigmas();
        for (int step = 0; step < kSteps; ++step) {
            dit.set("x", x);
            dit.set("t", Floats{times[step]});
            dit.set("cross_attn_cond", condition);
            dit.set("global_embed", global);
            dit.set("local_add_cond", Floats(static_cast<size_t>(channels + 1) * latents, 0.0f));
            dit.set("padding_mask", mask);
            const Floats velocity = dit.run("out");
            const Floats anew = noise.draw(x.size());
            for (size_t i = 0; i < x.size(); ++i) {
                const float denoised = x[i] - times[step] * velocity[i];
                x[i] = (1.0f - times[step + 1]) * denoised + times[step + 1] * anew[i];
            }
        }
    }

    // Decoding, a chunk and its context at a time.
    Model decoder(given[4]);
    Floats left, right;
    const int end = rounded_up(latents, kAlign) * kAlign, size = kAtMost - kContextLeft - kContextRight;
    for (int start = 0; start < wanted; start += size) {
        const int first = std::max(0, start - kContextLeft), last = std::min(end, start + size + kContextRight);
        decoder.resize("latents", {1, channels, last - first});
        decoder.resized();
        decoder.set("latents", part(x, channels, latents, first, last));
        const Floats audio = decoder.run("audio");
        const size_t length = audio.size() / 2, begin = static_cast<size_t>(start - first) * kSamplesPerLatent;
        const size_t stop = std::min(begin + static_cast<size_t>(size) * kSamplesPerLatent, length);
        left.insert(left.end(), audio.begin() + begin, audio.begin() + stop);
        right.insert(right.end(), audio.begin() + length + begin, audio.begin() + length + stop);
    }
    left.resize(samples);
    right.resize(samples);
    write_wav(given[5], left, right);
    return 0;
}
