// What a router makes of its logits [tokens, experts], fp32, and their gradient: a warp for each token. See gate.rs, whose loops these
// are. A warp has rows of `experts` numbers for itself in memory that its block shares.

// Keeps a sum of scores something to divide by.
constexpr float TINY = 1e-20f;

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(~0u, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// A token's softmax into `probs`; gives its logits' log-sum-exp.
__device__ __forceinline__ float softened(const float* logits, float* probs, Long experts) {
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

// Sigmoids into `scores`; gives their sum.
__device__ __forceinline__ float sigmoids(const float* logits, float* scores, Long experts) {
    float sum = 0;
    for (Long i = threadIdx.x; i < experts; i += 32) {
        scores[i] = 1.0f / (1.0f + expf(-logits[i]));
        sum += scores[i];
    }
    return row_sum(sum, nullptr);
}

// Whether one expert comes before another: its score is higher, or the same with a lower number. None has the number -1.
__device__ __forceinline__ bool before(float score, int expert, float than, int other) {
    return expert >= 0 && (other < 0 || score > than || (score == than && expert < other));
}

// The `choices` experts with the highest scores, plus `bias`, which may be none: the best first.
KERNEL void choose(
    const float* logits, const float* bias, Long* chosen, Long tokens, Long experts, Long choices, Long sigmoid) {
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
        softened(logits, scores, experts);
    }
    // A thread's own, which nobody else reads.
    unsigned taken = 0;
    for (Long i = threadIdx.x; i < experts; i += 32) {
        float score = scores[i] + (bias ? bias[i] : 0.0f);
        // What is not a number is never better, but somebody is chosen all the same.
        scores[i] = score == score ? score : -3.402823466e38f;
    }
    for (Long choice = 0; choice < choices; ++choice) {
        float best = 0;
        int expert = -1, place = 0;
        for (Long i = threadIdx.x; i < experts; i += 32, ++place) {
            if (!(taken >> place & 1) && before(scores[i], i, best, expert)) {
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
            chosen[token * choices + choice] = expert;
        }
    }
}

// Weights of choices, and over each block's `of_block` tokens the sums of each expert's probabilities and of squared log-sum-exps:
// `partial` [blocks, experts + 1].
KERNEL void gate(
    const float* logits, const Long* chosen, float* weights, float* partial, Long tokens, Long experts, Long choices, Long of_block,
    Long sigmoid, Long normalize, float scale) {
    DYNAMIC_SHARED(float, shared);
    float* probs = shared + threadIdx.y * experts;
    float* sums = shared + blockDim.y * experts + threadIdx.y * (experts + 1);
    for (Long i = threadIdx.x; i <= experts; i += 32) {
        sums[i] = 0;
    }
    Long end = (blockIdx.x + 1) * of_block < tokens ? (blockIdx.x + 1) * of_block : tokens;
    for (Long token = blockIdx.x * of_block + threadIdx.y; token < end; token += blockDim.y) {
        __syncwarp();
        float normalizer = softened(logits + token * experts, probs, experts), all = 1;
        if (sigmoid) {
            all = sigmoids(logits + token * experts, probs, experts) + TINY;
        }
        __syncwarp();
        float sum = 0;
        for (Long i = threadIdx.x; i < choices; i += 32) {
            Long expert = chosen[token * choices + i];
            if (expert < 0 || expert >= experts) {
                __trap();
            }
            sum += probs[expert];
        }
        sum = row_sum(sum, nullptr);
        float factor = normalize ? scale / (sum + TINY) : scale;
        for (Long i = threadIdx.x; i < choices; i += 32) {
            weights[token * choices + i] = probs[chosen[token * choices + i]] * factor;
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

// The gradient of logits, from those of what `gate` made: of weights [tokens, choices], of a group's sums [experts] and of the sum of
// squares []; each may be none.
KERNEL void gate_backward(
    const float* logits, const Long* chosen, const float* of_weights, const float* of_sums, const float* of_squares, float* out,
    Long tokens, Long experts, Long choices, Long sigmoid, Long normalize, float scale) {
    DYNAMIC_SHARED(float, shared);
    Long token = first_row();
    if (token >= tokens) {
        return;
    }
    logits += token * experts;
    chosen += token * choices;
    of_weights = of_weights ? of_weights + token * choices : nullptr;
    float* soft = shared + threadIdx.y * 3 * experts;
    float* of_scores = soft + experts;
    float* scores = sigmoid ? of_scores + experts : soft;
    float normalizer = softened(logits, soft, experts), mean = 0, all = 1;
    if (sigmoid) {
        // A probability is a score over the sum of all.
        all = sigmoids(logits, scores, experts) + TINY;
        for (Long i = threadIdx.x; i < experts; i += 32) {
            mean += of_sums ? scores[i] * of_sums[i] : 0.0f;
        }
        mean = row_sum(mean, nullptr) / all;
    }
    for (Long i = threadIdx.x; i < experts; i += 32) {
        of_scores[i] = ((of_sums ? of_sums[i] : 0.0f) - mean) / all;
    }
    __syncwarp();
    float factor = scale, along = 0;
    if (normalize) {
        // A weight is a score over the sum of those that were chosen.
        float sum = 0;
        for (Long i = threadIdx.x; i < choices; i += 32) {
            sum += scores[chosen[i]];
            along += of_weights ? scores[chosen[i]] * of_weights[i] : 0.0f;
        }
        sum = row_sum(sum, nullptr) + TINY;
        along = row_sum(along, nullptr) / sum;
        factor /= sum;
    }
    // A token's choices are different experts, so that each number is one thread's.
    for (Long i = threadIdx.x; i < choices && of_weights; i += 32) {
        of_scores[chosen[i]] += (of_weights[i] - along) * factor;
    }
    __syncwarp();
    float of_normalizer = of_squares ? 2.0f * *of_squares * normalizer : 0.0f;
    mean = 0;
    for (Long i = threadIdx.x; i < experts; i += 32) {
        mean += of_scores[i] * soft[i];
    }
    mean = row_sum(mean, nullptr);
    for (Long i = threadIdx.x; i < experts; i += 32) {
        float through = sigmoid ? of_scores[i] * scores[i] * (1.0f - scores[i]) : soft[i] * (of_scores[i] - mean);
        out[token * experts + i] = through + of_normalizer * soft[i];
    }
}
