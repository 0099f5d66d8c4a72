// Softmax and cross-entropy, one block per token. A first pass computes the maximum and the sum of
// exponentials, a second one the output; it finds the logits in the L2 cache.

// The lowest finite value instead of -infinity, so that exponentials of differences are defined.
constexpr float LOWEST = -3.402823466e38f;

struct MaxAndSum {
    float highest;
    // The sum of exp(x - highest).
    float sum;
};

__device__ __forceinline__ MaxAndSum merge(MaxAndSum one, MaxAndSum other) {
    MaxAndSum all;
    all.highest = one.highest > other.highest ? one.highest : other.highest;
    all.sum = one.sum * expf(one.highest - all.highest)
        + other.sum * expf(other.highest - all.highest);
    return all;
}

// Returns the same bits on all threads. NaN is ignored by the maximum and propagates by the sum.
__device__ MaxAndSum
block_max_and_sum(const Number* logits, Long width, float inverse, MaxAndSum* shared) {
    MaxAndSum own = {LOWEST, 0.0f};
    for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
        Numbers pack = load(logits + i);
        float highest = own.highest;
        for (int e = 0; e < VECTOR; ++e) {
            float x = wide(pack.x[e]) * inverse;
            highest = x > highest ? x : highest;
        }
        float sum = own.sum * expf(own.highest - highest);
        for (int e = 0; e < VECTOR; ++e) {
            sum += expf(wide(pack.x[e]) * inverse - highest);
        }
        own.highest = highest;
        own.sum = sum;
    }
    for (int step = 16; step > 0; step /= 2) {
        MaxAndSum other = {
            __shfl_xor_sync(~0u, own.highest, step), __shfl_xor_sync(~0u, own.sum, step)};
        own = merge(own, other);
    }
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = own;
    }
    __syncthreads();
    MaxAndSum all = shared[0];
    for (int warp = 1; warp < blockDim.x / 32; ++warp) {
        all = merge(all, shared[warp]);
    }
    return all;
}

// Computes out = exp(logits * inverse - highest) * scale. `out` may be `logits`.
__device__ void exponentials(
    const Number* logits, Number* out, Long width, float inverse, float highest, float scale) {
    for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
        Numbers pack = load(logits + i);
        Floats scaled;
        for (int e = 0; e < VECTOR; ++e) {
            scaled.x[e] = expf(wide(pack.x[e]) * inverse - highest) * scale;
        }
        store_rounded(out + i, scaled);
    }
}

KERNEL void softmax(
    const Number* logits, Number* out, float* largest, float* sums, Long width, float inverse) {
    STATIC_SHARED(MaxAndSum, shared, 32);
    const Number* own = logits + blockIdx.x * width;
    Number* to = out + blockIdx.x * width;
    MaxAndSum all = block_max_and_sum(own, width, inverse, shared);
    if (threadIdx.x == 0) {
        largest[blockIdx.x] = all.highest;
        sums[blockIdx.x] = all.sum;
    }
    exponentials(own, to, width, inverse, all.highest, 1.0f / all.sum);
}

// Computes probs * scale - minus * onehot(label) in place.
KERNEL void softmax_gradient(
    Number* probs, const float* scale, const Long* labels, const float* minus, Long width) {
    Long row = blockIdx.x, label = labels[row];
    if (label < 0 || label >= width) {
        __trap();
    }
    Number* own = probs + row * width;
    float factor = scale[row], own_minus = minus[row];
    for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
        Numbers pack = load(own + i);
        Floats gradient;
        for (int e = 0; e < VECTOR; ++e) {
            float x = wide(pack.x[e]) * factor;
            gradient.x[e] = i + e == label ? x - own_minus : x;
        }
        store_rounded(own + i, gradient);
    }
}

// Computes the loss of each token, which is zero for a negative label. If gradients are `wanted`,
// the logits become the gradients of the sum of the losses, times `factor`.
KERNEL void cross_entropy(
    Number* logits, const Long* labels, float* losses, Long width, float inverse, float factor,
    Long wanted) {
    STATIC_SHARED(MaxAndSum, shared, 32);
    Number* own = logits + blockIdx.x * width;
    Long label = labels[blockIdx.x];
    if (label >= width) {
        __trap();
    }
    if (label < 0) {
        if (threadIdx.x == 0) {
            losses[blockIdx.x] = 0;
        }
        if (wanted) {
            for (Long i = threadIdx.x; i < width; i += blockDim.x) {
                store_rounded(own + i, Pack<float, 1>{0.0f});
            }
        }
        return;
    }
    float label_logit = wide(own[label]) * inverse;
    // Its barrier keeps all writes to the logits after this read.
    MaxAndSum all = block_max_and_sum(own, width, inverse, shared);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(all.sum) + all.highest - label_logit;
    }
    if (!wanted) {
        return;
    }
    float scale = factor / all.sum;
    exponentials(own, own, width, inverse, all.highest, scale);
    __syncthreads();
    if (threadIdx.x == 0) {
        float gradient = expf(label_logit - all.highest) * scale - factor;
        store_rounded(own + label, Pack<float, 1>{gradient});
    }
}
