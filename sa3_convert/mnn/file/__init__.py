"""What a `.mnn` file holds, read without MNN."""
