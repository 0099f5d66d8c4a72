use std::time::Instant;
use tch::{Device, Kind, Tensor};
fn main() {
    let threads: i32 = std::env::args().nth(1).unwrap().parse().unwrap();
    tch::set_num_threads(threads);
    let f = |s: &[i64]| Tensor::randn(s, (Kind::Float, Device::Cpu));
    let mut all = [0.0; 9];
    for &(m, k, n) in &[
        (512i64, 8192i64, 256i64),
        (2048, 256, 1024),
        (512, 512, 256),
        (256, 2048, 256),
        (512, 1024, 256),
        (1024, 512, 512),
    ] {
        let (x, w, wt, xt) = (f(&[m, k]), f(&[k, n]), f(&[n, k]), f(&[k, m]));
        let b = |x: &Tensor| x.to_kind(Kind::BFloat16);
        let (bx, bw, bwt, bxt) = (b(&x), b(&w), b(&wt), b(&xt));
        let (out, bout) = (f(&[m, n]), b(&f(&[m, n])));
        let sum = Tensor::zeros([m, n], (Kind::Float, Device::Cpu));
        let mut t: Vec<Vec<f64>> = vec![vec![]; 9];
        let began = Instant::now();
        while began.elapsed().as_secs_f64() < 2.5 {
            for v in 0..9 {
                let s = Instant::now();
                match v {
                    0 => {
                        let _ = x.mm_out(&out, &w);
                    }
                    1 => {
                        let _ = x.mm_out(&out, &wt.tr());
                    }
                    2 => {
                        let _ = sum.shallow_clone().addmm_(&xt.tr(), &w);
                    }
                    3 => kernels::product_into(&out, &x, &w),
                    4 => kernels::product_into(&out, &x, &wt.tr()),
                    5 => kernels::add_product(&sum, &xt.tr(), &w),
                    6 => kernels::product_into(&bout, &bx, &bw),
                    7 => kernels::product_into(&bout, &bx, &bwt.tr()),
                    _ => kernels::add_product(&sum, &bxt.tr(), &bw),
                }
                t[v].push(s.elapsed().as_secs_f64());
            }
        }
        let med: Vec<f64> = t
            .iter_mut()
            .map(|t| {
                t.sort_by(f64::total_cmp);
                t[t.len() / 2]
            })
            .collect();
        let low: Vec<f64> = t.iter().map(|t| t[t.len() / 10]).collect();
        for v in 0..9 {
            all[v] += (low[v % 3] / low[v]).ln() / 6.0;
        }
        let r = |x: &Vec<f64>| (3..9).map(|v| format!("{:.2}", x[v % 3] / x[v])).collect::<Vec<_>>().join(" ");
        println!(
            "{m} {k} {n}: mkl {:.0} | med fp32 nn nt tn, bf16 nn nt tn: {} | p10 {}",
            2e-9 * (m * k * n) as f64 / med[0],
            r(&med),
            r(&low)
        );
    }
    println!("mean {}", all[3..].iter().map(|x| format!("{:.3}", x.exp())).collect::<Vec<_>>().join(" "));
}
