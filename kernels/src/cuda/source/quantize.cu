// Rounding to 8 bits (E4M3: 4 bits of exponent, 3 of mantissa, no infinity) with a scale per row.

constexpr float E4M3_MAX = 448.0f;

struct E4m3 {
    unsigned char bits;
};

// Rounds a number of at most 448 to nearest, ties to even.
__device__ __forceinline__ E4m3 to_e4m3(float x) {
    E4m3 result;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    result.bits = pair;
#else
    unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffff, code;
    if (magnitude > 0x7f800000) {
        code = 0x7f;
    } else if (magnitude < 0x3c800000) {
        // Below 2^-6 the step is 2^-9, which is the last bit of numbers from 2^14 on.
        code = __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - 0x46800000;
    } else {
        // The exponent's bias is 7 instead of 127.
        code = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    }
    result.bits = (bits >> 24 & 0x80) | code;
#endif
    return result;
}

// Each warp divides one row by its largest magnitude over 448, or by 1e-12 if that is more, and
// rounds it. `scales` [rows] receives the divisors.
KERNEL void quantize(const Number* x, E4m3* out, float* scales, Long rows, Long width) {
    for (Long row = first_row(); row < rows; row += grid_row_stride()) {
        const Number* own = x + row * width;
        float largest = 0;
        bool is_nan = false;
        for (Long i = threadIdx.x * VECTOR; i < width; i += 32 * VECTOR) {
            Numbers pack = load(own + i);
            for (int e = 0; e < VECTOR; ++e) {
                float magnitude = fabsf(wide(pack.x[e]));
                largest = magnitude > largest ? magnitude : largest;
                is_nan |= magnitude != magnitude;
            }
        }
        for (int step = 16; step > 0; step /= 2) {
            float other = __shfl_xor_sync(~0u, largest, step);
            largest = other > largest ? other : largest;
            is_nan |= __shfl_xor_sync(~0u, int(is_nan), step) != 0;
        }
        float scale = largest / E4M3_MAX;
        scale = scale < 1e-12f ? 1e-12f : scale;
        // A row with NaN is NaN throughout.
        scale = is_nan ? __uint_as_float(0x7fc00000) : scale;
        if (threadIdx.x == 0) {
            scales[row] = scale;
        }
        for (Long i = threadIdx.x * VECTOR; i < width; i += 32 * VECTOR) {
            Numbers pack = load(own + i);
            Pack<E4m3, VECTOR> rounded;
            for (int e = 0; e < VECTOR; ++e) {
                float ratio = wide(pack.x[e]) / scale;
                ratio = ratio > E4M3_MAX ? E4M3_MAX : ratio < -E4M3_MAX ? -E4M3_MAX : ratio;
                rounded.x[e] = to_e4m3(ratio);
            }
            store(out + row * width + i, rounded);
        }
    }
}
