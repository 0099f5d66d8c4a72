use super::*;
use proptest::prelude::*;

/// Returns a configuration with sequences of 8 tokens, from the text `TRAIN | SCHEDULE`.
pub(crate) fn config(text: &str) -> Config {
    let (train, schedule) = text.split_once('|').unwrap();
    let train = format!("{{{train}, micro_batch: 1}}");
    parse(&train, 8, &format!("schedule: {{{schedule}}}"))
}

fn parse(train: &str, length: usize, schedule: &str) -> Config {
    let text = format!(
        "run: {{dir: x}}\n\
         model: {{vocab_size: 8, hidden: 8, layers: 1, heads: 1, ffn: 8}}\n\
         data: {{train: [{{path: x}}], sequence_length: {length}}}\n\
         train: {train}\n\
         {schedule}\n"
    );
    serde_saphyr::from_str(&text).unwrap()
}

/// Returns the rates of all steps.
fn rates(config: &Config) -> Vec<f64> {
    let mut position = Position { step: 0, tokens: 0 };
    let mut rates = Vec::new();
    while position.step < config.train.steps {
        rates.push(learning_rate(config, position));
        position.tokens += config.step_tokens_at(position.tokens);
        position.step += 1;
    }
    rates
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-6 * b.abs().max(1e-12), "{a} is not {b}");
}

fn all_close(rates: &[f64], expected: &[f64]) {
    assert_eq!(rates.len(), expected.len());
    for (rate, expected) in rates.iter().zip(expected) {
        close(*rate, *expected);
    }
}

#[test]
fn the_power_law_has_the_values_of_the_paper() {
    let power = PowerConfig::default();
    let paper = |beta: f64, tokens: f64| power_law(&power, beta * 4096.0, tokens);
    for (beta, tokens, expected) in [
        (32.0, 1e9, 3.290107e-3),
        (32.0, 1e10, 1.016740e-3),
        (128.0, 1e8, 2.0e-2),
        (128.0, 1e9, 1.316043e-2),
        (128.0, 2e9, 9.241547e-3),
        (128.0, 1e11, 1.256811e-3),
        (128.0, 1.28e11, 1.108136e-3),
        (512.0, 1e10, 1.626784e-2),
        (512.0, 1.28e11, 4.432542e-3),
        (1024.0, 1e10, 2.0e-2),
        (1024.0, 1.28e11, 8.865084e-3),
        (1024.0, 1e12, 3.107134e-3),
    ] {
        close(paper(beta, tokens), expected);
    }
}

/// The rates of the smoke run before this schedule counted tokens.
#[test]
fn the_smoke_run_has_its_rates_to_the_bit_until_the_decay() {
    let text = include_str!("../../../../configs/smoke.yaml");
    let rates = rates(&serde_saphyr::from_str(text).unwrap());
    for (step, rate) in [
        (1, 0.00016915051623995402),
        (2, 0.00033830103247990803),
        (15, 0.0025372577435993104),
        (29, 0.0049053649709586665),
        (30, 0.005074515487198621),
        (31, 0.004990360942070578),
        (100, 0.002746163700297622),
        (240, 0.0017571898618485829),
    ] {
        assert_eq!(rates[step - 1], rate, "step {step}");
    }
    // FNV-1a over the bits of all 240.
    let hash = rates[..240]
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, rate| {
            (hash ^ rate.to_bits()).wrapping_mul(0x100_0000_01b3)
        });
    assert_eq!(hash, 0x084f_7ca4_1d76_f257_u64);
    assert!(rates[299] > 0.0 && rates[299] < 0.02 * rates[239]);
}

#[test]
fn power_follows_the_law_at_the_tokens_seen() {
    let config = config(
        "steps: 100, global_batch: 512 | power: {max_lr: 1.0, warmup_steps: 10, decay_steps: 20}",
    );
    let rates = rates(&config);
    let power = PowerConfig {
        max_lr: 1.0,
        ..PowerConfig::default()
    };
    let law = |steps: f64| power_law(&power, 4096.0, steps * 4096.0);
    close(rates[0], law(10.0) / 10.0);
    close(rates[9], law(10.0));
    close(rates[49], law(50.0));
    for k in 1..=20 {
        let f = ((1.0 - f64::from(k) / 21.0).exp() - 1.0) / (E - 1.0);
        close(rates[79 + k as usize], f * law(80.0));
    }
}

/// A checkpoint of 3200 tokens in 20 steps resumes with another batch or sequence length.
#[test]
fn power_after_a_change_of_batch_or_length_uses_the_tokens_seen() {
    let schedule = "schedule: {power: {max_lr: 1.0, warmup_steps: 3}}";
    for (batch, length) in [(32, 20), (8, 80), (3, 7), (1, 1)] {
        let train = format!("{{steps: 30, global_batch: {batch}, micro_batch: 1}}");
        let config = parse(&train, length, schedule);
        for done in 0..10 {
            let step_tokens = batch * length as u64;
            let position = Position {
                step: 20 + done,
                tokens: 3200 + done * step_tokens,
            };
            let seen = (position.tokens + step_tokens) as f64;
            let expected = step_tokens as f64 / 4096.0 * 4.0 * seen.powf(-0.51);
            let rate = learning_rate(&config, position);
            assert!((rate / expected - 1.0).abs() < 1e-12, "{batch} {length}");
            if (batch, length, done) == (32, 20, 0) {
                assert!((rate - 9.287e-3).abs() < 5e-7, "{rate}");
            }
        }
    }
}

#[test]
fn power_has_one_step_at_its_peak() {
    let config = config(
        "steps: 12, global_batch: 8 | power: {max_lr: 1.0, warmup_steps: 5, decay_steps: 7}",
    );
    let rates = rates(&config);
    assert!(rates[..5].windows(2).all(|pair| pair[0] < pair[1]));
    assert!(rates[4..].windows(2).all(|pair| pair[0] > pair[1]));
    assert!(rates[11] > 0.0);
}

#[test]
fn other_schedules_match_values_computed_by_hand() {
    let of = |text: &str| rates(&config(text));
    let wsd = of("steps: 20, global_batch: 1 | wsd: {lr: 1.0, warmup_steps: 4, decay_steps: 3}");
    close(wsd[0], 0.25);
    assert_eq!(wsd[3..17], [1.0; 14]);
    all_close(
        &wsd[17..],
        &[0.5, 1.0 - 0.5f64.sqrt(), 1.0 - 0.75f64.sqrt()],
    );
    let cosine = of("steps: 11, global_batch: 1 | cosine: {lr: 2.0, final_ratio: 0.1}");
    all_close(&[cosine[0], cosine[5]], &[2.0, 1.1]);
    assert_eq!(cosine[10], 0.2);
    let to_zero = of("steps: 4, global_batch: 1 | linear: {lr: 2.0}");
    all_close(&to_zero, &[2.0, 1.5, 1.0, 0.5]);
    let linear = of("steps: 5, global_batch: 1 | linear: {lr: 2.0, final_ratio: 0.5}");
    all_close(&linear, &[2.0, 1.75, 1.5, 1.25, 1.0]);
    let constant = of("steps: 8, global_batch: 1 | constant: {lr: 3.0, warmup_steps: 3}");
    all_close(&constant[..4], &[1.0, 2.0, 3.0, 3.0]);
}

/// With one batch size, a length in tokens is the same as one in steps.
#[test]
fn lengths_in_tokens_equal_lengths_in_steps() {
    let same = |schedule: &str| {
        let of = |unit: &str, factor: u64| {
            let text = schedule
                .replace("WARM", &format!("warmup_{unit}: {}", 3 * factor))
                .replace("DECAY", &format!("decay_{unit}: {}", 4 * factor));
            rates(&config(&format!("steps: 12, global_batch: 5 | {text}")))
        };
        all_close(&of("tokens", 40), &of("steps", 1));
    };
    same("power: {max_lr: 1.0, WARM, DECAY}");
    same("wsd: {lr: 1.0, WARM, DECAY}");
    same("cosine: {lr: 1.0, final_ratio: 0.1, WARM}");
    same("cosine: {lr: 1.0, WARM}");
    same("linear: {lr: 1.0, final_ratio: 0.1, WARM}");
    same("linear: {lr: 1.0, WARM}");
    same("constant: {lr: 1.0, WARM}");
}

/// The end of a run in tokens follows the batch of now, not that of the steps before.
#[test]
fn a_decay_in_tokens_ends_with_the_run_after_a_change_of_batch() {
    let now = config("steps: 30, global_batch: 4 | wsd: {lr: 1.0, decay_tokens: 128}");
    // Until step 20, there were 16 sequences.
    let rate = |step: u64| {
        let tokens = 20 * 128 + (step - 20) * 32;
        learning_rate(&now, Position { step, tokens })
    };
    assert_eq!(rate(25), 1.0);
    close(rate(26), 1.0 - 0.2f64.sqrt());
    close(rate(29), 1.0 - 0.8f64.sqrt());
}

#[test]
fn power_follows_a_batch_ramp() {
    let ramp = "[{tokens: 0, sequences: 2}, {tokens: 100, sequences: 8}]";
    let config = config(&format!(
        "steps: 12, global_batch: {ramp} | power: {{max_lr: 1.0, warmup_steps: 1, decay_steps: 2}}"
    ));
    let rates = rates(&config);
    let law = |batch: f64, seen: f64| batch / 4096.0 * 4.0 * seen.powf(-0.51);
    // Seven steps of 16 tokens begin before 100.
    for (step, &rate) in rates[..7].iter().enumerate() {
        close(rate, law(16.0, (step + 1) as f64 * 16.0));
    }
    for (step, &rate) in rates[7..10].iter().enumerate() {
        close(rate, law(64.0, 112.0 + (step + 1) as f64 * 64.0));
    }
    let start = law(64.0, 112.0 + 3.0 * 64.0);
    close(rates[10], start * exponential_to_zero(1.0 / 3.0));
    close(rates[11], start * exponential_to_zero(2.0 / 3.0));
}

fn batches() -> impl Strategy<Value = String> {
    let stage = (1u64..300, 1usize..9);
    proptest::collection::vec(stage, 0..4).prop_flat_map(|later| {
        (1usize..9).prop_map(move |first| {
            let mut tokens = 0;
            let mut text = format!("[{{tokens: 0, sequences: {first}}}");
            for (more, sequences) in &later {
                tokens += more;
                text += &format!(", {{tokens: {tokens}, sequences: {sequences}}}");
            }
            text + "]"
        })
    })
}

/// A schedule, and the number of its steps of warm-up and decay.
fn schedules(steps: u64) -> impl Strategy<Value = (&'static str, f64, u64, u64)> {
    let name = prop::sample::select(vec!["power", "wsd", "cosine", "linear", "constant"]);
    let ratio = prop_oneof![Just(0.0), 0.01f64..1.0];
    (name, ratio, 0..=steps).prop_flat_map(move |(name, ratio, warmup)| {
        (0..=steps - warmup).prop_map(move |decay| (name, ratio, warmup, decay))
    })
}

fn schedule_text(name: &str, ratio: f64, warmup: &str, decay: &str) -> String {
    match name {
        "power" => format!("power: {{max_lr: 1.0, {warmup}, {decay}}}"),
        "wsd" => format!("wsd: {{lr: 1.0, {warmup}, {decay}}}"),
        "constant" => format!("constant: {{lr: 1.0, {warmup}}}"),
        _ => format!("{name}: {{lr: 1.0, final_ratio: {ratio}, {warmup}}}"),
    }
}

proptest! {
    #[test]
    fn closed_forms_of_the_batch_equal_loops(
        batches in batches(),
        begin in 0u64..2000,
        steps in 0u64..60,
    ) {
        let config = config(&format!("steps: 1, global_batch: {batches} | constant: {{lr: 1.0}}"));
        let mut tokens = begin;
        for _ in 0..steps {
            tokens += config.step_tokens_at(tokens);
        }
        prop_assert_eq!(config.tokens_after(begin, steps), tokens);
        let split = steps / 3;
        let middle = config.tokens_after(begin, split);
        prop_assert_eq!(config.tokens_after(middle, steps - split), tokens);
        let whole = config.steps_within(begin);
        prop_assert!(config.tokens_after(0, whole) <= begin);
        prop_assert!(config.tokens_after(0, whole + 1) > begin);
    }

    #[test]
    fn a_default_warmup_leaves_the_tokens_of_the_decay(
        steps in 1u64..40,
        batches in batches(),
        decay in 0u64..2000,
    ) {
        let train = format!("{{steps: {steps}, global_batch: {batches}, micro_batch: 1}}");
        let total = parse(&train, 8, "").tokens_after(0, steps);
        let schedule = format!("schedule: {{power: {{decay_tokens: {}}}}}", decay.min(total));
        let resolved = parse(&train, 8, &schedule).resolved();
        prop_assert_eq!(resolved.problems(1), Vec::<String>::new());
    }

    #[test]
    fn every_step_trains_and_the_last_is_right(
        steps in 1u64..60,
        batches in batches(),
        (name, ratio, warmup, decay) in schedules(60),
    ) {
        let warmup = warmup.min(steps);
        let decay = decay.min(steps - warmup);
        for (warmup_unit, decay_unit) in [
            ("steps", "steps"), ("tokens", "steps"), ("steps", "tokens"), ("tokens", "tokens"),
        ] {
            let text = format!("steps: 1, global_batch: {batches} | constant: {{lr: 1.0}}");
            let plan = config(&text);
            let total = plan.tokens_after(0, steps);
            let length = |phase: &str, unit: &str, length: u64, tokens: u64| {
                let length = if unit == "steps" { length } else { tokens };
                format!("{phase}_{unit}: {length}")
            };
            let warmup_tokens = plan.tokens_after(0, warmup);
            let decay_tokens = total - plan.tokens_after(0, steps - decay);
            let text = schedule_text(
                name,
                ratio,
                &length("warmup", warmup_unit, warmup, warmup_tokens),
                &length("decay", decay_unit, decay, decay_tokens),
            );
            let config = config(&format!("steps: {steps}, global_batch: {batches} | {text}"));
            let rates = rates(&config);
            for (step, rate) in rates.iter().enumerate() {
                prop_assert!(*rate > 0.0 && *rate <= 1.0, "{text}: step {step} has {rate}");
            }
            if name == "power" {
                continue;
            }
            // Warm-up rises, then the rate is constant or falls: one step, or one plateau, is at
            // the peak.
            let peak = rates.iter().position(|rate| *rate == 1.0);
            let top = peak.unwrap_or(0);
            prop_assert!(rates[..=top].windows(2).all(|pair| pair[0] < pair[1]), "{text}");
            prop_assert!(rates[top..].windows(2).all(|pair| pair[0] >= pair[1]), "{text}");
            let at_peak = rates.iter().filter(|rate| **rate == 1.0).count() as u64;
            let expected = match name {
                "wsd" => {
                    let stable = steps - decay;
                    stable - warmup.max(1).min(stable) + u64::from(decay < steps)
                }
                "constant" => steps - warmup.max(1) + 1,
                _ => 1,
            };
            prop_assert_eq!(at_peak, expected, "{}", text);
            if ["cosine", "linear"].contains(&name) && ratio > 0.0 && steps > warmup.max(1) {
                prop_assert_eq!(*rates.last().unwrap(), ratio, "{}", text);
            }
        }
    }

    /// No two steps differ by more than the steepest slope of a phase allows.
    #[test]
    fn rates_are_continuous(
        warmup in 10u64..40,
        stable in 0u64..40,
        decay in 10u64..40,
        name in prop::sample::select(vec!["power", "wsd", "cosine", "linear"]),
    ) {
        let steps = warmup + stable + decay;
        let text = schedule_text(
            name,
            0.1,
            &format!("warmup_steps: {warmup}"),
            &format!("decay_steps: {decay}"),
        );
        let config = config(&format!("steps: {steps}, global_batch: 4 | {text}"));
        let rates = rates(&config);
        let peak = rates.iter().copied().fold(0.0, f64::max);
        // The steepest: a tenth in warm-up, and `1 - sqrt(x)` at the start of its decay.
        let steepest = (1.0 / (decay as f64 + 1.0)).sqrt().max(0.11) + 1e-9;
        for pair in rates.windows(2) {
            prop_assert!((pair[1] - pair[0]).abs() <= steepest * peak, "{text}: {pair:?}");
        }
    }

    /// A default never refuses a run, and its last step trains.
    #[test]
    fn defaults_fit_every_length(steps in 1u64..2000, batches in batches(), decay in 0u64..2000) {
        let train = format!("{{steps: {steps}, global_batch: {batches}, micro_batch: 1}}");
        let decay = decay.min(steps);
        for schedule in [
            String::new(),
            "schedule: {power: {}}".to_string(),
            format!("schedule: {{power: {{decay_steps: {decay}}}}}"),
            format!("schedule: {{power: {{decay_tokens: {decay}}}}}"),
            "schedule: {constant: {lr: 1e-3}}".to_string(),
        ] {
            let config = parse(&train, 8, &schedule);
            let resolved = config.resolved();
            prop_assert_eq!(config.problems(1), Vec::<String>::new());
            prop_assert_eq!(resolved.problems(1), Vec::<String>::new(), "{}", schedule);
            let last = Position {
                step: steps - 1,
                tokens: config.tokens_after(0, steps - 1),
            };
            prop_assert!(learning_rate(&config, last) > 0.0);
        }
    }
}
