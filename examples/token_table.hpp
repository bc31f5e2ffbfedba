// Prompts to token ids by a bundle's `tokenizer.table`: byte-pair encoding with the standard library alone.
//
// The file is a line of JSON, then arrays, little-endian, one behind the other: `pairs` (uint64, ascending, the left id
// in the upper half), `ranks` and `merged` (uint32, of each pair), `characters` (uint32, code points) and `ids` (uint32,
// of each character), `bytes` (int32; 256 ids for characters that have none, or nothing).

#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

class TokenTable {
public:
    explicit TokenTable(const char* path) {
        std::ifstream file(path, std::ios::binary);
        const std::string content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        const size_t line = content.find('\n');
        if (line == std::string::npos) throw std::runtime_error(std::string("no table: ") + path);
        head_ = content.substr(0, line);
        read_head();
        at_ = line + 1;
        pairs_ = array<uint64_t>(content, "pairs");
        ranks_ = array<uint32_t>(content, "ranks");
        merged_ = array<uint32_t>(content, "merged");
        const auto characters = array<uint32_t>(content, "characters"), ids = array<uint32_t>(content, "ids");
        bytes_ = array<int32_t>(content, "bytes");
        if (format_ != 1 || at_ != content.size() || ranks_.size() != pairs_.size() ||
            merged_.size() != pairs_.size() || ids.size() != characters.size() || bytes_.size() % 256 != 0)
            throw std::runtime_error(std::string("damaged: ") + path);
        for (size_t i = 0; i < ids.size(); ++i) characters_[characters[i]] = static_cast<int>(ids[i]);
    }

    // The ids of a prompt in UTF-8, with what stands around it.
    std::vector<int> encode(const std::string& prompt) const {
        std::vector<int> ids = before_;
        size_t start = 0, position = 0;
        while (position <= prompt.size()) {
            const std::pair<const std::string, int>* found = nullptr;
            for (const auto& token : added_)  // of those that begin here the longest
                if (prompt.compare(position, token.first.size(), token.first) == 0 && position < prompt.size() &&
                    (!found || token.first.size() > found->first.size()))
                    found = &token;
            if (found || position == prompt.size()) merge(prompt.substr(start, position - start), ids);
            if (found) ids.push_back(found->second);
            position += found ? found->first.size() : 1;
            if (found) start = position;
        }
        ids.insert(ids.end(), after_.begin(), after_.end());
        return ids;
    }

private:
    static constexpr uint32_t kNone = UINT32_MAX;

    // Neighbours merge, the lowest rank first and of equal ones the leftmost, until no pair does.
    void merge(std::string text, std::vector<int>& ids) const {
        for (size_t at = 0; !from_.empty() && (at = text.find(from_, at)) != std::string::npos; at += to_.size())
            text.replace(at, from_.size(), to_);
        std::vector<int> symbols = this->symbols(text);
        std::vector<size_t> found(symbols.size(), pairs_.size());
        for (size_t i = 0; i + 1 < symbols.size(); ++i) found[i] = pair(symbols[i], symbols[i + 1]);
        for (;;) {
            size_t best = 0;
            for (size_t i = 1; i < found.size(); ++i)
                if (rank(found[i]) < rank(found[best])) best = i;
            if (found.empty() || rank(found[best]) == kNone) break;
            symbols[best] = static_cast<int>(merged_[found[best]]);
            symbols.erase(symbols.begin() + best + 1);
            found.erase(found.begin() + best + 1);
            for (const size_t i : {best - 1, best})
                if (i < symbols.size()) found[i] = i + 1 < symbols.size() ? pair(symbols[i], symbols[i + 1]) : pairs_.size();
        }
        ids.insert(ids.end(), symbols.begin(), symbols.end());
    }

    std::vector<int> symbols(const std::string& text) const {
        std::vector<int> symbols;
        bool pending = false;
        const auto flush = [&] {
            if (pending) symbols.push_back(unknown_);
            pending = false;
        };
        for (size_t at = 0, size = 0; at < text.size(); at += size) {
            const auto lead = static_cast<unsigned char>(text[at]);
            size = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
            if (at + size > text.size()) throw std::runtime_error("the prompt is no UTF-8");
            uint32_t code = size == 1 ? lead : lead & (0x7F >> size);
            for (size_t i = 1; i < size; ++i) code = code << 6 | (static_cast<unsigned char>(text[at + i]) & 0x3F);
            if (const auto known = characters_.find(code); known != characters_.end()) {
                flush();
                symbols.push_back(known->second);
                continue;
            }
            std::vector<int> fallback;
            for (size_t i = 0; i < size; ++i)
                fallback.push_back(bytes_.empty() ? -1 : bytes_[static_cast<unsigned char>(text[at + i])]);
            if (*std::min_element(fallback.begin(), fallback.end()) >= 0) {
                symbols.insert(symbols.end(), fallback.begin(), fallback.end());
                continue;
            }
            if (!fuse_unknown_) flush();
            pending = unknown_ >= 0;
        }
        flush();
        return symbols;
    }

    size_t pair(int left, int right) const {
        const uint64_t key = static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
        const auto place = std::lower_bound(pairs_.begin(), pairs_.end(), key);
        return place != pairs_.end() && *place == key ? place - pairs_.begin() : pairs_.size();
    }

    uint32_t rank(size_t pair) const { return pair < ranks_.size() ? ranks_[pair] : kNone; }

    template <typename T>
    std::vector<T> array(const std::string& content, const char* name) {
        std::vector<T> values(lengths_[name] <= content.size() ? lengths_[name] : 0);
        if (values.size() != lengths_[name] || values.size() * sizeof(T) > content.size() - at_)
            throw std::runtime_error("a table is cut off");
        if (!values.empty()) std::memcpy(values.data(), &content[at_], values.size() * sizeof(T));
        at_ += values.size() * sizeof(T);
        return values;
    }

    // The line of JSON: an object whose values are numbers, words, texts, and lists and objects of these.
    void read_head() {
        object([this](const std::string& key) {
            if (key == "lengths") object([this](const std::string& name) { lengths_[name] = number(); });
            else if (key == "added") object([this](const std::string& token) { added_[token] = number(); });
            else if (key == "before") list([this] { before_.push_back(number()); });
            else if (key == "after") list([this] { after_.push_back(number()); });
            else if (key == "replaced" && peek() == '[')
                list([this] { (from_.empty() ? from_ : to_) = text(); });
            else if (key == "format") format_ = number();
            else if (key == "unknown" && peek() != 'n') unknown_ = number();
            else fuse_unknown_ = word() == "true" && key == "fuse_unknown";
        });
    }

    template <typename F>
    void object(F value) {
        list('{', '}', [&] {
            const std::string key = text();
            expect(':');
            value(key);
        });
    }
    template <typename F>
    void list(F value) { list('[', ']', value); }
    template <typename F>
    void list(char open, char close, F value) {
        expect(open);
        while (peek() != close) {
            value();
            if (peek() != close) expect(',');
        }
        expect(close);
    }
    char peek() {
        while (at_ < head_.size() && std::isspace(static_cast<unsigned char>(head_[at_]))) ++at_;
        if (at_ >= head_.size()) throw std::runtime_error("a table's head is cut off");
        return head_[at_];
    }
    void expect(char wanted) {
        if (peek() != wanted) throw std::runtime_error("a table's head is damaged");
        ++at_;
    }
    std::string word() {
        std::string found;
        for (peek(); at_ < head_.size() && std::isalnum(static_cast<unsigned char>(head_[at_])); ++at_) found += head_[at_];
        return found;
    }
    int number() { return std::atoi(word().c_str()); }
    uint32_t unit() {
        const std::string digits = head_.substr(at_, 4);
        at_ += 4;
        return static_cast<uint32_t>(std::strtoul(digits.c_str(), nullptr, 16));
    }
    std::string text() {
        std::string found;
        for (expect('"'); peek_raw() != '"';) {
            const char letter = head_[at_++];
            if (letter != '\\') {
                found += letter;
                continue;
            }
            const char escaped = peek_raw();
            ++at_;
            const char* plain = std::strchr("nrtbf", escaped);
            if (escaped != 'u') {
                found += plain ? "\n\r\t\b\f"[plain - "nrtbf"] : escaped;
                continue;
            }
            uint32_t code = unit();
            if (code >= 0xD800 && code < 0xDC00) {
                at_ += 2;
                code = 0x10000 + ((code - 0xD800) << 10) + (unit() - 0xDC00);
            }
            if (code < 0x80) found += static_cast<char>(code);
            for (int size = code < 0x80 ? 0 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4, i = size; i > 0; --i)
                found += static_cast<char>(i == size ? (0xF00 >> size & 0xFF) | code >> 6 * (size - 1)
                                                     : 0x80 | (code >> 6 * (i - 1) & 0x3F));
        }
        ++at_;
        return found;
    }
    char peek_raw() {
        if (at_ >= head_.size()) throw std::runtime_error("a table's head is cut off");
        return head_[at_];
    }

    std::string head_, from_, to_;
    size_t at_ = 0;
    std::map<std::string, size_t> lengths_;
    std::map<std::string, int> added_;
    std::vector<uint64_t> pairs_;
    std::vector<uint32_t> ranks_, merged_;
    std::unordered_map<uint32_t, int> characters_;
    std::vector<int32_t> bytes_;
    std::vector<int> before_, after_;
    int format_ = 0, unknown_ = -1;
    bool fuse_unknown_ = false;
};
