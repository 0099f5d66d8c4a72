// Rotary position embedding (arXiv 2104.09864). Elements i and i + half of a row form a pair that
// rotates by the angle of the row's position: its number over `rows_per_position`, modulo
// `positions`. If `of_tokens` is given, it holds that position of each token of each sequence
// instead. Elements from 2 * half to `width` are copied.

KERNEL void apply_rotary(
    const Number* x, const Number* cos, const Number* sin, const Long* of_tokens, Number* out,
    Long rows, Long half, Long width, Long rows_per_position, Long positions,
    Long rows_per_sequence) {
    for (Long row = first_row(); row < rows; row += grid_row_stride()) {
        // Rows fit 32 bits, and a 64-bit division costs more than the rest of the loop.
        Long position = unsigned(row) / unsigned(rows_per_position) % unsigned(positions);
        if (of_tokens) {
            Long sequence = unsigned(row) / unsigned(rows_per_sequence);
            position = of_tokens[sequence * positions + position];
        }
        const Number* input_row = x + row * width;
        Number* output_row = out + row * width;
        for (Long i = threadIdx.x * VECTOR; i < half; i += blockDim.x * VECTOR) {
            Numbers one = load(input_row + i), other = load(input_row + half + i);
            Numbers c = load(cos + position * half + i), s = load(sin + position * half + i);
            Floats first, second;
            for (int e = 0; e < VECTOR; ++e) {
                float a = wide(one.x[e]), b = wide(other.x[e]);
                first.x[e] = a * wide(c.x[e]) - b * wide(s.x[e]);
                second.x[e] = b * wide(c.x[e]) + a * wide(s.x[e]);
            }
            store_rounded(output_row + i, first);
            store_rounded(output_row + half + i, second);
        }
        for (Long i = 2 * half + threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR)
            store(output_row + i, load(input_row + i));
    }
}
