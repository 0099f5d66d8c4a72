//! Names of the folders in a folder of checkpoints: `step-NNNNNNNN`, with a suffix for all that is
//! no checkpoint. In each is a manifest.

use std::path::Path;

/// The name of the manifest in the folder of a checkpoint.
pub(crate) const MANIFEST: &str = "manifest.json";

/// Suffix of a checkpoint that is being written.
pub(crate) const WRITING: &str = "writing";

/// Suffix of a checkpoint that keepers are writing. Ranks that miss a keeper may write the same
/// step at the same time.
pub(crate) const KEEPERS_WRITING: &str = "keepers-writing";

/// Suffix of a checkpoint that is being removed.
pub(crate) const REMOVING: &str = "removing";

/// Suffix of a checkpoint that was set aside, possibly with a number after it.
pub(crate) const DAMAGED: &str = "damaged";

/// Suffixes of what interrupted writes and removals leave.
pub(crate) const LEFTOVER_SUFFIXES: [&str; 3] = [WRITING, KEEPERS_WRITING, REMOVING];

/// Returns the name of the checkpoint of a step.
pub(crate) fn checkpoint_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Returns the step of a folder with the name of a checkpoint, `step-NNNNNNNN`.
pub(crate) fn step_of(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_prefix("step-")?;
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().ok())?
}

/// True for the suffixes of checkpoints that were set aside.
pub(crate) fn is_damaged_suffix(suffix: &str) -> bool {
    let rest = suffix.strip_prefix(DAMAGED);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// Returns what follows the number in a name such as `step-NNNNNNNN.writing`.
pub(crate) fn suffix_of(path: &Path) -> Option<&str> {
    let (stem, suffix) = path.file_name()?.to_str()?.split_once('.')?;
    step_of(Path::new(stem)).map(|_| suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_are_steps() {
        let step = |name: &str| step_of(Path::new(name));
        assert_eq!(step("run/checkpoints/step-00000020"), Some(20));
        assert_eq!(step(&checkpoint_name(123_456_789)), Some(123_456_789));
        for name in [
            "step-",
            "step-+5",
            "step-5.writing",
            "step--5",
            "best",
            "step-99999999999999999999",
        ] {
            assert_eq!(step(name), None, "{name}");
        }
        let suffix = |name: &'static str| suffix_of(Path::new(name));
        assert_eq!(suffix("step-00000020.writing"), Some(WRITING));
        assert_eq!(suffix("step-00000020.damaged-2"), Some("damaged-2"));
        assert!(is_damaged_suffix("damaged-2") && is_damaged_suffix(DAMAGED));
        assert!(!is_damaged_suffix("damagedx"));
        assert_eq!(suffix("notes.writing"), None);
    }
}
