use std::time::Instant;
use tch::{Device, Kind, Tensor};
fn main() {
    tch::set_num_threads(2);
    for kind in [Kind::Float, Kind::BFloat16] {
        for &(m, k, n) in &[
            (512i64, 256i64, 1024i64),
            (512, 512, 256),
            (512, 1024, 256),
            (2048, 256, 8192),
            (512, 8192, 256),
            (2048, 256, 256),
            (1024, 512, 256),
        ] {
            let r = |s: &[i64]| Tensor::randn(s, (Kind::Float, Device::Cpu)).to_kind(kind);
            let (x, w, wt, xt) = (r(&[m, k]), r(&[k, n]), r(&[n, k]), r(&[k, m]));
            let out = r(&[m, n]);
            let sum = Tensor::zeros([m, n], (Kind::Float, Device::Cpu));
            let mut t = [f64::MAX; 5];
            for _ in 0..40 {
                let a = Instant::now();
                if kind == Kind::Float {
                    let _ = x.mm_out(&out, &wt.tr());
                    t[0] = t[0].min(a.elapsed().as_secs_f64());
                }
                let a = Instant::now();
                kernels::product_into(&out, &x, &w);
                t[1] = t[1].min(a.elapsed().as_secs_f64());
                let a = Instant::now();
                kernels::product_into(&out, &x, &wt.tr());
                t[2] = t[2].min(a.elapsed().as_secs_f64());
                let a = Instant::now();
                kernels::add_product(&sum, &xt.tr(), &w);
                t[3] = t[3].min(a.elapsed().as_secs_f64());
                let a = Instant::now();
                if kind == Kind::Float {
                    let _ = sum.shallow_clone().addmm_(&xt.tr(), &w);
                    t[4] = t[4].min(a.elapsed().as_secs_f64());
                }
            }
            let g: Vec<String> = t.iter().map(|t| format!("{:.0}", 2e-9 * (m * k * n) as f64 / t)).collect();
            println!("{kind:?} {m} {k} {n}: mkl {} nn {} nt {} tn+ {} mkl tn+ {}", g[0], g[1], g[2], g[3], g[4]);
        }
    }
}
