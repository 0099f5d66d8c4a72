// AdamW (arXiv 1711.05101) on fp32 master weights, fused with the rounding of the stored weights.

// Elements of a pack: the fp32 tensors determine it.
constexpr int FOUR = VECTOR == 1 ? 1 : 4;

// `stored` may be null.
KERNEL void adamw(
    float* master, const float* gradient, float* averages, float* squares, Number* stored,
    Long count, float inverse_scale, float decay_factor, float beta1, float beta2, float step_size,
    float inverse_root_correction, float eps) {
    Long thread = Long(blockIdx.x) * blockDim.x + threadIdx.x;
    Long threads = Long(gridDim.x) * blockDim.x;
    for (Long i = thread * FOUR; i < count; i += threads * FOUR) {
        Pack<float, FOUR> x = load<FOUR>(master + i), g = load<FOUR>(gradient + i);
        Pack<float, FOUR> m = load<FOUR>(averages + i), v = load<FOUR>(squares + i);
        for (int e = 0; e < FOUR; ++e) {
            float slope = g.x[e] * inverse_scale;
            m.x[e] += (slope - m.x[e]) * (1.0f - beta1);
            v.x[e] = v.x[e] * beta2 + slope * slope * (1.0f - beta2);
            x.x[e] = x.x[e] * decay_factor
                - step_size * m.x[e] / (sqrtf(v.x[e]) * inverse_root_correction + eps);
        }
        store<FOUR>(master + i, x);
        store<FOUR>(averages + i, m);
        store<FOUR>(squares + i, v);
        if (stored) {
            store_rounded(stored + i, x);
        }
    }
}
