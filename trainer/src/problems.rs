//! A list of problems, and the checks that several keys share.

/// A number from the configuration and the key, or expression of keys, that it belongs to.
pub(crate) struct Quantity<'a> {
    name: &'a str,
    value: usize,
}

impl<'a> Quantity<'a> {
    pub(crate) fn new(name: &'a str, value: usize) -> Quantity<'a> {
        Quantity { name, value }
    }
}

/// Sizes on each side of a wrong one that are tried for a message.
const SEARCHED: usize = 1 << 20;

/// Reasons why an experiment cannot run.
#[derive(Default)]
pub(crate) struct Problems(Vec<String>);

impl Problems {
    pub(crate) fn add(&mut self, problem: impl Into<String>) {
        self.0.push(problem.into());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn into_list(self) -> Vec<String> {
        self.0
    }

    /// Refuses a whole that the part does not divide, for the reason `why`.
    pub(crate) fn divides(&mut self, whole: Quantity, part: Quantity, why: &str) {
        if part.value == 0 || whole.value.is_multiple_of(part.value) {
            return;
        }
        let divides = |size: &usize| whole.value.is_multiple_of(*size);
        let smaller = (1..part.value).rev().take(SEARCHED).find(divides);
        let larger = (part.value..=whole.value).take(SEARCHED).find(divides);
        let nearest: Vec<String> = smaller
            .into_iter()
            .chain(larger)
            .map(|size| size.to_string())
            .collect();
        self.add(format!(
            "{} {} is not a multiple of {} {} (remainder {}; nearest that divides: {}): {why}",
            whole.name,
            whole.value,
            part.name,
            part.value,
            whole.value % part.value,
            nearest.join(" or ")
        ));
    }
}
