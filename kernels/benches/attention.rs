//! Benchmark of our attention against libtorch's kernel, in rounds of both:
//! `cargo bench -p kernels --bench attention`.

use kernels::{
    AttentionOptions, ScoreMask, attention, attention_backward, block_attention,
    block_attention_backward,
};
use std::{hint::black_box, time::Instant};
use tch::{Device, Kind, Tensor};

const ROUNDS: usize = 9;
const SCALE: f64 = 0.125;

struct Case {
    name: &'static str,
    length: i64,
    window: Option<i64>,
    key_width: i64,
    value_width: i64,
}

/// Inputs of a case: 8 query heads, 2 key heads.
struct Operands {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
}

impl Operands {
    fn new(case: &Case, kind: Kind) -> Operands {
        let random = |heads: i64, width: i64| {
            Tensor::randn([1, heads, case.length, width], (kind, Device::Cpu))
        };
        Operands {
            query: random(8, case.key_width),
            key: random(2, case.key_width),
            value: random(2, case.value_width),
            grad: random(8, case.value_width),
        }
    }

    fn inputs(&self) -> [&Tensor; 3] {
        [&self.query, &self.key, &self.value]
    }

    /// Runs our kernels forward and backward.
    fn ours(&self, options: &AttentionOptions) {
        let (out, lse) = attention(&self.query, &self.key, &self.value, options);
        let grads = attention_backward(&self.grad, self.inputs(), &out, &lse, options);
        let _ = black_box(grads);
    }

    /// Runs libtorch's kernel forward and backward.
    fn libtorch(&self, mask: ScoreMask) {
        let (out, lse) = block_attention(self.inputs(), mask, SCALE);
        let grads = block_attention_backward(&self.grad, self.inputs(), &out, &lse, mask, SCALE);
        let _ = black_box(grads);
    }
}

fn milliseconds(body: impl FnOnce()) -> f64 {
    let start = Instant::now();
    body();
    start.elapsed().as_secs_f64() * 1e3
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    tch::set_num_threads(1);
    let case = |name, window, key_width, value_width| Case {
        name,
        length: 2048,
        window,
        key_width,
        value_width,
    };
    let cases = [
        case("causal", None, 64, 64),
        case("window 128", Some(128), 64, 64),
        case("window 1024", Some(1024), 64, 64),
        case("widths 192 and 128", None, 192, 128),
    ];
    println!("| attention, 2048 positions | dtype | ours, ms | libtorch, ms |\n|---|---|---|---|");
    for case in &cases {
        for kind in [Kind::Float, Kind::BFloat16] {
            let operands = Operands::new(case, kind);
            let options = AttentionOptions {
                scale: SCALE,
                window: case.window,
            };
            let mask = ScoreMask::Causal(case.window);
            let mut ours = Vec::new();
            let mut libtorch = Vec::new();
            for _ in 0..ROUNDS {
                ours.push(milliseconds(|| operands.ours(&options)));
                libtorch.push(milliseconds(|| operands.libtorch(mask)));
            }
            let name = case.name;
            println!(
                "| {name} | {kind:?} | {:.1} | {:.1} |",
                median(ours),
                median(libtorch)
            );
        }
    }
}
