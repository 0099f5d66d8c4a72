// Routers on fp32 logits [tokens, experts], one warp per token, with the loops of router.rs. Each
// warp has its own rows of `experts` elements in the shared memory of its block.

// Keeps the sum of scores a nonzero divisor.
constexpr float TINY = 1e-20f;

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(~0u, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// Writes the softmax of a token's logits to `probs` and returns their log-sum-exp.
__device__ __forceinline__ float softmax_row(const float* logits, float* probs, Long experts) {
    float highest = -3.402823466e38f, sum = 0;
    for (Long i = threadIdx.x; i < experts; i += 32) {
        highest = logits[i] > highest ? logits[i] : highest;
    }
    highest = warp_max(highest);
    for (Long i = threadIdx.x; i < experts; i += 32) {
        probs[i] = expf(logits[i] - highest);
        sum += probs[i];
    }
    sum = row_sum(sum, nullptr);
    for (Long i = threadIdx.x; i < experts; i += 32) {
        probs[i] /= sum;
    }
    return highest + logf(sum);
}

// Writes the sigmoids of a token's logits to `scores` and returns their sum.
__device__ __forceinline__ float sigmoids(const float* logits, float* scores, Long experts) {
    float sum = 0;
    for (Long i = threadIdx.x; i < experts; i += 32) {
        scores[i] = 1.0f / (1.0f + expf(-logits[i]));
        sum += scores[i];
    }
    return row_sum(sum, nullptr);
}

// True if an expert ranks before another: its score is higher, or the same with a lower index.
// Index -1 stands for no expert.
__device__ __forceinline__ bool before(float score, int expert, float than, int other) {
    return expert >= 0 && (other < 0 || score > than || (score == than && expert < other));
}

// Selects the `top_k` experts with the highest scores plus `bias`, in descending order. `bias` may
// be null.
KERNEL void select_experts(
    const float* logits, const float* bias, Long* chosen, Long tokens, Long experts, Long top_k,
    Long sigmoid) {
    DYNAMIC_SHARED(float, shared);
    Long token = first_row();
    if (token >= tokens) {
        return;
    }
    logits += token * experts;
    float* scores = shared + threadIdx.y * experts;
    if (sigmoid) {
        sigmoids(logits, scores, experts);
    } else {
        softmax_row(logits, scores, experts);
    }
    // One bit per expert of this thread.
    unsigned taken = 0;
    for (Long i = threadIdx.x; i < experts; i += 32) {
        float score = scores[i] + (bias ? bias[i] : 0.0f);
        // NaN ranks last, so that `top_k` experts are selected even then.
        scores[i] = score == score ? score : -3.402823466e38f;
    }
    for (Long k = 0; k < top_k; ++k) {
        float best = 0;
        int expert = -1, bit = 0;
        for (Long i = threadIdx.x; i < experts; i += 32, ++bit) {
            if (!(taken >> bit & 1) && before(scores[i], i, best, expert)) {
                best = scores[i];
                expert = i;
            }
        }
        for (int step = 16; step > 0; step /= 2) {
            float score = __shfl_xor_sync(~0u, best, step);
            int other = __shfl_xor_sync(~0u, expert, step);
            if (before(score, other, best, expert)) {
                best = score;
                expert = other;
            }
        }
        if (expert % 32 == threadIdx.x) {
            taken |= 1u << expert / 32;
            chosen[token * top_k + k] = expert;
        }
    }
}

// Computes the routing weights. `partial` [blocks, experts + 1] receives sums over the
// `tokens_per_block` tokens of each block: of each expert's probabilities, then of the squared
// log-sum-exps.
KERNEL void router(
    const float* logits, const Long* chosen, float* weights, float* partial, Long tokens,
    Long experts, Long top_k, Long tokens_per_block, Long sigmoid, Long normalize, float scale) {
    DYNAMIC_SHARED(float, shared);
    float* probs = shared + threadIdx.y * experts;
    float* sums = shared + blockDim.y * experts + threadIdx.y * (experts + 1);
    for (Long i = threadIdx.x; i <= experts; i += 32) {
        sums[i] = 0;
    }
    Long next_block = (blockIdx.x + 1) * tokens_per_block;
    Long end = next_block < tokens ? next_block : tokens;
    Long first = blockIdx.x * tokens_per_block + threadIdx.y;
    for (Long token = first; token < end; token += blockDim.y) {
        __syncwarp();
        float normalizer = softmax_row(logits + token * experts, probs, experts), all = 1;
        if (sigmoid) {
            all = sigmoids(logits + token * experts, probs, experts) + TINY;
        }
        __syncwarp();
        float sum = 0;
        for (Long i = threadIdx.x; i < top_k; i += 32) {
            Long expert = chosen[token * top_k + i];
            if (expert < 0 || expert >= experts) {
                __trap();
            }
            sum += probs[expert];
        }
        sum = row_sum(sum, nullptr);
        float factor = normalize ? scale / (sum + TINY) : scale;
        for (Long i = threadIdx.x; i < top_k; i += 32) {
            weights[token * top_k + i] = probs[chosen[token * top_k + i]] * factor;
        }
        for (Long i = threadIdx.x; i < experts; i += 32) {
            sums[i] += probs[i] / all;
        }
        if (experts % 32 == threadIdx.x) {
            sums[experts] += normalizer * normalizer;
        }
    }
    __syncthreads();
    for (Long i = threadIdx.y * 32 + threadIdx.x; i <= experts; i += blockDim.y * 32) {
        float sum = 0;
        for (int y = 0; y < blockDim.y; ++y) {
            sum += shared[blockDim.y * experts + y * (experts + 1) + i];
        }
        partial[blockIdx.x * (experts + 1) + i] = sum;
    }
}

// Computes the gradient of the logits from the gradients of what `router` computes: routing weights
// [tokens, top_k], probability sums of the group [experts] and z sum []. Each may be null.
KERNEL void router_backward(
    const float* logits, const Long* chosen, const float* grad_weights, const float* grad_sums,
    const float* grad_z, float* out, Long tokens, Long experts, Long top_k, Long sigmoid,
    Long normalize, float scale) {
    DYNAMIC_SHARED(float, shared);
    Long token = first_row();
    if (token >= tokens) {
        return;
    }
    logits += token * experts;
    chosen += token * top_k;
    grad_weights = grad_weights ? grad_weights + token * top_k : nullptr;
    float* soft = shared + threadIdx.y * 3 * experts;
    float* grad_scores = soft + experts;
    float* scores = sigmoid ? grad_scores + experts : soft;
    float normalizer = softmax_row(logits, soft, experts), mean = 0, all = 1;
    if (sigmoid) {
        // A probability is a score over the sum of all scores.
        all = sigmoids(logits, scores, experts) + TINY;
        for (Long i = threadIdx.x; i < experts; i += 32) {
            mean += grad_sums ? scores[i] * grad_sums[i] : 0.0f;
        }
        mean = row_sum(mean, nullptr) / all;
    }
    for (Long i = threadIdx.x; i < experts; i += 32) {
        grad_scores[i] = ((grad_sums ? grad_sums[i] : 0.0f) - mean) / all;
    }
    __syncwarp();
    float factor = scale, along = 0;
    if (normalize) {
        // A routing weight is a score over the sum of the chosen scores.
        float sum = 0;
        for (Long i = threadIdx.x; i < top_k; i += 32) {
            sum += scores[chosen[i]];
            along += grad_weights ? scores[chosen[i]] * grad_weights[i] : 0.0f;
        }
        sum = row_sum(sum, nullptr) + TINY;
        along = row_sum(along, nullptr) / sum;
        factor /= sum;
    }
    // The experts of a token are distinct, so each element belongs to one thread.
    for (Long i = threadIdx.x; i < top_k && grad_weights; i += 32) {
        grad_scores[chosen[i]] += (grad_weights[i] - along) * factor;
    }
    __syncwarp();
    float grad_normalizer = grad_z ? 2.0f * *grad_z * normalizer : 0.0f;
    mean = 0;
    for (Long i = threadIdx.x; i < experts; i += 32) {
        mean += grad_scores[i] * soft[i];
    }
    mean = row_sum(mean, nullptr);
    for (Long i = threadIdx.x; i < experts; i += 32) {
        float through = sigmoid ? grad_scores[i] * scores[i] * (1.0f - scores[i])
                                : soft[i] * (grad_scores[i] - mean);
        out[token * experts + i] = through + grad_normalizer * soft[i];
    }
}
