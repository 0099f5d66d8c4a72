use std::time::Instant;
use tch::{Device, Kind, Tensor};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    tch::set_num_threads(a[6].parse().unwrap());
    let kind = if a[1] == "f" { Kind::Float } else { Kind::BFloat16 };
    let (m, k, n): (i64, i64, i64) = (a[3].parse().unwrap(), a[4].parse().unwrap(), a[5].parse().unwrap());
    let r = |s: &[i64]| Tensor::randn(s, (Kind::Float, Device::Cpu)).to_kind(kind);
    let (x, w, wt, xt) = (r(&[m, k]), r(&[k, n]), r(&[n, k]), r(&[k, m]));
    let out = r(&[m, n]);
    let sum = Tensor::zeros([m, n], (Kind::Float, Device::Cpu));
    let began = Instant::now();
    let mut times = vec![];
    while began.elapsed().as_secs_f64() < 2.0 {
        let s = Instant::now();
        match a[2].as_str() {
            "mkl" => {
                let _ = x.mm_out(&out, &wt.tr());
            }
            "nn" => kernels::product_into(&out, &x, &w),
            "nt" => kernels::product_into(&out, &x, &wt.tr()),
            _ => kernels::add_product(&sum, &xt.tr(), &w),
        }
        times.push(s.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let g = |t: f64| 2e-9 * (m * k * n) as f64 / t;
    println!("{:?}: best {:.0} median {:.0}", &a[1..], g(times[0]), g(times[times.len() / 2]));
}
