//! Tests that need a GPU: sizes beyond 32 bits, limits of launches, and rates. `scripts/gpu-check`
//! runs them.

use super::tests::test_gpu;
use crate::{
    RowGroups, combine, cross_entropy, gemm_accumulate, grouped_gemm, grouped_gemm_accumulate,
    grouped_gemm_overwrite, quantize_rows, rms_norm, rms_norm_backward, swiglu::swiglu,
    tensors::tests::TestTensor,
};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Returns the GPU, which MOERUN_TEST_DEVICE=cuda selects.
fn gpu() -> Device {
    let (_, device) = test_gpu();
    assert!(
        matches!(device, Device::Cuda(_)),
        "set MOERUN_TEST_DEVICE=cuda"
    );
    device
}

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (kind, gpu()))
}

fn assert_close(ours: &Tensor, plain: &Tensor, tolerance: f64) {
    let [ours, plain] = [ours, plain].map(Tensor::to_f64);
    let off = (&ours - &plain).norm().double_value(&[]);
    let allowed = tolerance * plain.norm().double_value(&[]).max(1e-3);
    assert!(off <= allowed, "off by {off} where {allowed} is allowed");
}

#[test]
#[ignore = "needs a GPU"]
fn every_variant_loads() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for shift in [0, 1] {
            let flat = random(&[2 * 64 + 1], kind);
            let hidden = flat.narrow(0, shift, 128).view([2, 64]);
            let halves = hidden.to_f64().chunk(2, -1);
            let plain = halves[0].silu() * &halves[1];
            assert_close(&swiglu(&hidden), &plain, 1e-2);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_widest_norms_launch() {
    for width in [12_256i64, 12_257, 12_288] {
        let [x, grad] = [(); 2].map(|()| random(&[3, width], Kind::BFloat16));
        let weight = random(&[width], Kind::BFloat16);
        let (out, scale) = rms_norm(&x, &weight, 1e-5);
        let (grad_x, grad_weight) = rms_norm_backward(&grad, &x, &scale, &weight);
        let normed = x.to_f64() * scale.to_f64();
        assert_close(&out, &(&normed * weight.to_f64()), 1e-2);
        let sums = (grad.to_f64() * normed).sum_dim_intlist([0i64].as_slice(), false, Kind::Double);
        assert_close(&grad_weight, &sums, 1e-2);
        assert_eq!(grad_x.size(), x.size());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn more_than_two_billion_logits_are_reached() {
    let tokens = 50_000;
    let words = 50_304;
    let logits = random(&[tokens, words], Kind::BFloat16);
    let labels = Tensor::randint(words, [tokens], (Kind::Int64, gpu()));
    let last = logits.narrow(0, tokens - 1, 1).copy();
    let label = labels.narrow(0, tokens - 1, 1);
    let losses = cross_entropy(&logits, &labels, 1.0, Some(1.0));
    let wide = last.to_f64();
    let plain = wide.logsumexp([-1i64].as_slice(), false)
        - wide.gather(1, &label.unsqueeze(1), false).squeeze_dim(1);
    assert_close(&losses.narrow(0, tokens - 1, 1), &plain, 1e-4);
    let ones = Tensor::ones([1, 1], (Kind::Double, gpu()));
    let gradient = wide
        .softmax(-1, Kind::Double)
        .scatter_add(1, &label.unsqueeze(1), &-ones);
    assert_close(&logits.narrow(0, tokens - 1, 1), &gradient, 2e-2);
}

#[test]
#[ignore = "needs a GPU"]
fn rows_beyond_two_billion_elements_are_combined() {
    let rows = 1_200_000;
    let all = random(&[rows, 2048], Kind::BFloat16);
    let ids: Vec<i32> = (0..rows as i32).collect();
    let ids = Tensor::from_slice(&ids).to_device(gpu()).view([-1, 8]);
    let out = combine(&all, &ids, None);
    let last = all.narrow(0, rows - 8, 8).to_f64();
    let plain = last.sum_dim_intlist([0i64].as_slice(), false, Kind::Double);
    assert_close(&out.get(rows / 8 - 1), &plain, 1e-2);
}

#[test]
#[ignore = "needs a GPU"]
fn any_groups_may_be_empty() {
    let patterns: [Vec<i64>; 5] = [
        vec![0; 8],
        vec![40; 8],
        (0..8)
            .map(|group| if group == 3 { 0 } else { 17 })
            .collect(),
        (0..65).collect(),
        (0..1000).map(|group| group % 3).collect(),
    ];
    for counts in patterns {
        let groups = RowGroups::from(&counts[..]);
        let total = groups.num_rows();
        let num_groups = counts.len() as i64;
        let [rows, grad] = [64, 32].map(|width| random(&[total, width], Kind::BFloat16));
        let matrices = random(&[num_groups, 64, 32], Kind::BFloat16);
        let sums = Tensor::full([num_groups, 32, 64], f64::NAN, (Kind::Float, gpu()));
        let out = grouped_gemm(&rows, &[matrices.shallow_clone()], &groups);
        grouped_gemm_overwrite(&sums, &grad, &rows, &groups);
        let mut start = 0;
        for (group, &len) in counts.iter().enumerate() {
            let own = rows.narrow(0, start, len).to_f64();
            let matrix = matrices.get(group as i64).to_f64();
            assert_close(&out.narrow(0, start, len), &own.matmul(&matrix), 1e-2);
            let gradient = grad.narrow(0, start, len).to_f64().tr().matmul(&own);
            assert_close(&sums.get(group as i64), &gradient, 1e-2);
            start += len;
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn no_rows_are_rounded_to_nothing() {
    let (small, scales) = quantize_rows(&random(&[0, 64], Kind::BFloat16));
    assert_eq!((small.size(), scales.size()), (vec![0, 64], vec![0, 1]));
}

/// Prints the rate of `body`, which moves `bytes` and computes `flops`, as a JSON line.
fn print_rate(name: &str, bytes: f64, flops: f64, body: impl Fn()) {
    const LAUNCHES: u32 = 20;
    body();
    torch_ext::synchronize(gpu()).unwrap();
    let started = Instant::now();
    for _ in 0..LAUNCHES {
        body();
    }
    torch_ext::synchronize(gpu()).unwrap();
    let seconds = started.elapsed().as_secs_f64() / f64::from(LAUNCHES);
    let rate = |amount: f64| amount / seconds * 1e-9;
    println!(
        "{{\"kernel\":\"{name}\",\"us\":{:.1},\"gb_per_s\":{:.0},\"gflop_per_s\":{:.0}}}",
        seconds * 1e6,
        rate(bytes),
        rate(flops)
    );
}

#[test]
#[ignore = "needs a GPU"]
fn rates_at_the_sizes_of_a_step() {
    let bf16 = Kind::BFloat16;
    let tokens = 16_384;
    let [hidden, ffn, experts, top_k] = [2048, 1024, 64, 8];
    let routed = tokens * top_k;
    let bytes = |x: &Tensor| (x.numel() * x.kind().elt_size_in_bytes()) as f64;
    let rows = random(&[routed, hidden], bf16);
    print_rate("copy", 2.0 * bytes(&rows), 0.0, || drop(rows.copy()));
    print_rate("quantize", 1.5 * bytes(&rows), 0.0, || {
        drop(quantize_rows(&rows))
    });
    let x = random(&[tokens, hidden], bf16);
    let weight = random(&[hidden], bf16);
    print_rate("rms_norm", 2.0 * bytes(&x), 0.0, || {
        drop(rms_norm(&x, &weight, 1e-5))
    });
    let (_, scale) = rms_norm(&x, &weight, 1e-5);
    print_rate("rms_norm_backward", 3.0 * bytes(&x), 0.0, || {
        drop(rms_norm_backward(&x, &x, &scale, &weight));
    });
    let gate_up = random(&[routed, 2 * ffn], bf16);
    print_rate("swiglu", 1.5 * bytes(&gate_up), 0.0, || {
        drop(swiglu(&gate_up))
    });
    let ids = Tensor::randperm(routed, (Kind::Int, gpu())).view([tokens, top_k]);
    print_rate("combine", bytes(&rows) + bytes(&x), 0.0, || {
        drop(combine(&rows, &ids, None))
    });
    let matrices = random(&[experts, hidden, 2 * ffn], bf16);
    let group_rows = routed / experts;
    let groups = RowGroups::new(vec![group_rows; experts as usize]);
    let flops = 2.0 * (routed * hidden * 2 * ffn) as f64;
    print_rate("grouped_gemm", 0.0, flops, || {
        drop(grouped_gemm(&rows, &[matrices.shallow_clone()], &groups));
    });
    // Two ways to the gradients of experts: `_grouped_mm`, whose bf16 result is added, and one
    // cuBLAS call for each expert, which adds in fp32.
    let sums = random(&[experts, 2 * ffn, hidden], Kind::Float);
    print_rate("grouped_gemm_accumulate", 0.0, flops, || {
        grouped_gemm_accumulate(&sums, &gate_up, &rows, &groups);
    });
    print_rate("gemm_accumulate of each expert", 0.0, flops, || {
        for expert in 0..experts {
            let own = |x: &Tensor| x.narrow(0, expert * group_rows, group_rows);
            gemm_accumulate(&sums.get(expert), &own(&gate_up).tr(), &own(&rows));
        }
    });
    let square = random(&[hidden, hidden], bf16);
    let flops = 2.0 * (tokens * hidden * hidden) as f64;
    print_rate("mm", 0.0, flops, || drop(x.mm(&square)));
    let logits = random(&[5336, 50_304], bf16);
    let labels = Tensor::zeros([5336], (Kind::Int64, gpu()));
    print_rate("cross_entropy", 3.0 * bytes(&logits), 0.0, || {
        drop(cross_entropy(&logits, &labels, 1.0, Some(1.0)));
    });
}
