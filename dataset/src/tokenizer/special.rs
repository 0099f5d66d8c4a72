//! The choice of the tokens that end and begin documents.
//!
//! A pure function of the user's options, the files of a tokenizer's folder and its vocabulary.
//! Names in files can be wrong for pretraining: chat models name the end of a turn.

/// A token that ends or begins documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Special {
    /// The id that token files have.
    pub id: u32,
    /// The text as in the vocabulary.
    pub text: String,
}

/// Names that end documents, the most specific first.
const DOCUMENT_ENDS: [&str; 10] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<|end▁of▁sentence|>",
    "<eos>",
    "</s>",
    "[EOS]",
    "<EOS_TOKEN>",
    "<|eos|>",
    "<EOT>",
];

const DOCUMENT_STARTS: [&str; 7] = [
    "<|begin_of_text|>",
    "<｜begin▁of▁sentence｜>",
    "<bos>",
    "<s>",
    "<|startoftext|>",
    "[BOS]",
    "<BOS_TOKEN>",
];

/// Names that end a turn or a message of a chat.
const TURN_ENDS: [&str; 16] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|endofturn|>",
    "[|endofturn|]",
    "<|user|>",
    "<|observation|>",
];

/// A name for a special token, and the file that has it.
#[derive(Debug, Clone)]
pub(super) struct Named {
    pub(super) file: &'static str,
    pub(super) token: NameOrId,
}

/// A token by its text or its id.
#[derive(Debug, Clone)]
pub(super) enum NameOrId {
    Name(String),
    Id(u32),
}

/// A token of the vocabulary.
#[derive(Debug, Clone)]
pub(super) struct Token {
    pub(super) special: Special,
    /// True if the file lists it as a special token, so that text never becomes this token.
    pub(super) is_special: bool,
}

/// The vocabulary, as far as the choice needs it.
pub(super) trait Tokens {
    fn by_text(&self, text: &str) -> Option<Token>;
    fn by_id(&self, id: u32) -> Option<Token>;
    /// Returns the texts of all special tokens, by id.
    fn special(&self) -> Vec<String>;
}

/// Kind of special token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    End,
    Start,
}

impl Role {
    fn option(self) -> &'static str {
        match self {
            Role::End => "--eos",
            Role::Start => "--bos",
        }
    }

    fn verb(self) -> &'static str {
        match self {
            Role::End => "end",
            Role::Start => "begin",
        }
    }

    fn known(self) -> &'static [&'static str] {
        match self {
            Role::End => &DOCUMENT_ENDS,
            Role::Start => &DOCUMENT_STARTS,
        }
    }
}

fn find(tokens: &dyn Tokens, token: &NameOrId) -> Option<Token> {
    match token {
        NameOrId::Name(name) => tokens.by_text(name),
        NameOrId::Id(id) => tokens.by_id(*id),
    }
}

fn ends_turns(text: &str) -> bool {
    TURN_ENDS.contains(&text)
}

/// Returns the known names in the vocabulary. One that can be part of ordinary text, such as
/// Gemma's `</s>`, which is HTML there, counts only as a special token.
fn known(role: Role, tokens: &dyn Tokens) -> Vec<Special> {
    let found = role.known().iter().filter_map(|name| tokens.by_text(name));
    let certain = |token: &Token| {
        let text = &token.special.text;
        token.is_special || text.starts_with("<|") || text.starts_with("<｜")
    };
    found.filter(certain).map(|token| token.special).collect()
}

/// Chooses the token for a role and appends notes for the user. `Ok(None)` if nothing names one.
///
/// # Errors
/// If the option's token is not in the vocabulary.
pub(super) fn choose(
    role: Role,
    option: Option<&str>,
    named: &[Named],
    tokens: &dyn Tokens,
    notes: &mut Vec<String>,
) -> Result<Option<Special>, String> {
    let verb = role.verb();
    let flag = role.option();
    if let Some(text) = option {
        let by_id = || text.parse().ok().and_then(|id| tokens.by_id(id));
        let Some(token) = tokens.by_text(text).or_else(by_id) else {
            return Err(format!(
                "{flag} {text}: the tokenizer has no such token; {}",
                listed(tokens)
            ));
        };
        warn_of(role, &token, notes);
        notes.push(chosen(role, &token.special, &format!("by {flag}")));
        return Ok(Some(token.special));
    }
    let known = known(role, tokens);
    for name in named {
        let Some(token) = find(tokens, &name.token) else {
            notes.push(format!(
                "{} names {}, which is not in the vocabulary",
                name.file,
                described(&name.token)
            ));
            continue;
        };
        let text = &token.special.text;
        let ordinary = !token.is_special && !text.starts_with("<|");
        let doubtful = role == Role::End && (ends_turns(text) || ordinary);
        if let Some(better) = known.first().filter(|_| doubtful) {
            let why = if ordinary {
                "is an ordinary token that also stands inside of text"
            } else {
                "ends turns of a chat"
            };
            notes.push(format!(
                "warning: {} names {text:?}, which {why}; documents {verb} with {:?} instead \
                 (choose with {flag})",
                name.file, better.text
            ));
            notes.push(chosen(role, better, "a known name in the vocabulary"));
            return Ok(Some(better.clone()));
        }
        warn_of(role, &token, notes);
        notes.push(chosen(
            role,
            &token.special,
            &format!("named by {}", name.file),
        ));
        disagreement(&token.special, named, tokens, notes);
        return Ok(Some(token.special));
    }
    let Some(first) = known.first() else {
        return Ok(None);
    };
    notes.push(chosen(role, first, "a known name in the vocabulary"));
    if known.len() > 1 {
        let others: Vec<_> = known[1..].iter().map(|token| &*token.text).collect();
        notes.push(format!(
            "the vocabulary also has {} (choose with {flag})",
            others.join(", ")
        ));
    }
    Ok(Some(first.clone()))
}

/// Notes what other files say about documents' ends.
fn disagreement(chosen: &Special, named: &[Named], tokens: &dyn Tokens, notes: &mut Vec<String>) {
    for name in named {
        let Some(other) = find(tokens, &name.token) else {
            continue;
        };
        if other.special.id != chosen.id && !ends_turns(&other.special.text) {
            notes.push(format!(
                "{} names {:?} instead",
                name.file, other.special.text
            ));
        }
    }
}

fn warn_of(role: Role, token: &Token, notes: &mut Vec<String>) {
    let text = &token.special.text;
    if role == Role::End && ends_turns(text) {
        notes.push(format!(
            "warning: {text:?} ends turns of a chat; a model learns to end documents with it"
        ));
    } else if !token.is_special {
        notes.push(format!(
            "warning: {text:?} is not a special token; text inside of documents can become it"
        ));
    }
}

fn chosen(role: Role, special: &Special, why: &str) -> String {
    let Special { id, text } = special;
    format!("documents {} with {text:?} (id {id}), {why}", role.verb())
}

fn described(token: &NameOrId) -> String {
    match token {
        NameOrId::Name(name) => format!("{name:?}"),
        NameOrId::Id(id) => format!("the id {id}"),
    }
}

/// Lists the special tokens, for messages.
pub(super) fn listed(tokens: &dyn Tokens) -> String {
    const SHOWN: usize = 20;
    let special = tokens.special();
    if special.is_empty() {
        return "it has no special tokens".into();
    }
    let more = match special.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let shown = special[..special.len().min(SHOWN)].join(", ");
    format!("its special tokens are {shown}{more}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens by id; those with a star are special.
    struct Vocabulary(&'static [&'static str]);

    impl Tokens for Vocabulary {
        fn by_text(&self, text: &str) -> Option<Token> {
            let id = self
                .0
                .iter()
                .position(|token| token.trim_start_matches('*') == text)?;
            self.by_id(id as u32)
        }

        fn by_id(&self, id: u32) -> Option<Token> {
            let token = self.0.get(id as usize)?;
            let text = token.trim_start_matches('*').to_owned();
            Some(Token {
                is_special: token.starts_with('*'),
                special: Special { id, text },
            })
        }

        fn special(&self) -> Vec<String> {
            let special = self.0.iter().filter_map(|token| token.strip_prefix('*'));
            special.map(str::to_owned).collect()
        }
    }

    fn name(file: &'static str, text: &str) -> Named {
        let token = match text.parse() {
            Ok(id) => NameOrId::Id(id),
            Err(_) => NameOrId::Name(text.into()),
        };
        Named { file, token }
    }

    /// Returns the text of the end of documents, or nothing, and the number of warnings.
    fn end(
        vocabulary: &'static [&'static str],
        option: Option<&str>,
        named: &[Named],
    ) -> (String, usize) {
        let mut notes = Vec::new();
        let tokens = Vocabulary(vocabulary);
        let chosen = choose(Role::End, option, named, &tokens, &mut notes).unwrap();
        let warnings = notes
            .iter()
            .filter(|note| note.starts_with("warning"))
            .count();
        (chosen.map_or(String::new(), |token| token.text), warnings)
    }

    #[test]
    fn options_come_first() {
        let tokens = &["a", "*<|endoftext|>", "*<|im_end|>"];
        let config = [name("tokenizer_config.json", "<|endoftext|>")];
        assert_eq!(
            end(tokens, Some("<|im_end|>"), &config),
            ("<|im_end|>".into(), 1)
        );
        assert_eq!(end(tokens, Some("2"), &config), ("<|im_end|>".into(), 1));
        assert_eq!(end(tokens, Some("a"), &config), ("a".into(), 1));
        let unknown = choose(
            Role::End,
            Some("x"),
            &[],
            &Vocabulary(tokens),
            &mut Vec::new(),
        );
        let error = unknown.unwrap_err();
        assert!(error.contains("--eos x") && error.contains("<|endoftext|>, <|im_end|>"));
    }

    #[test]
    fn known_names_that_are_special() {
        assert_eq!(
            end(&["a", "*<|end_of_text|>"], None, &[]).0,
            "<|end_of_text|>"
        );
        assert_eq!(
            end(&["*<｜end▁of▁sentence｜>"], None, &[]).0,
            "<｜end▁of▁sentence｜>"
        );
        // Gemma's </s> is HTML.
        assert_eq!(end(&["*<eos>", "</s>"], None, &[]).0, "<eos>");
        assert_eq!(end(&["</s>"], None, &[]).0, "");
        assert_eq!(end(&["*</s>"], None, &[]).0, "</s>");
        assert_eq!(end(&["*<|im_end|>"], None, &[]).0, "");
    }

    #[test]
    fn ends_of_turns_are_replaced_or_warned_of() {
        let config = |text| [name("tokenizer_config.json", text)];
        let qwen = &["*<|endoftext|>", "*<|im_end|>"];
        assert_eq!(
            end(qwen, None, &config("<|im_end|>")),
            ("<|endoftext|>".into(), 1)
        );
        let gemma = &["*<eos>", "*<end_of_turn>", "</s>"];
        assert_eq!(
            end(gemma, None, &config("<end_of_turn>")),
            ("<eos>".into(), 1)
        );
        assert_eq!(end(gemma, None, &config("</s>")), ("<eos>".into(), 1));
        let only = &["*<|im_end|>"];
        assert_eq!(
            end(only, None, &config("<|im_end|>")),
            ("<|im_end|>".into(), 1)
        );
    }

    #[test]
    fn files_are_asked_in_order() {
        let tokens = &["*<a>", "*<b>", "*<|eot_id|>"];
        let named = [
            name("tokenizer_config.json", "<missing>"),
            name("special_tokens_map.json", "<b>"),
            name("config.json", "0"),
        ];
        let mut notes = Vec::new();
        let token = choose(Role::End, None, &named, &Vocabulary(tokens), &mut notes).unwrap();
        assert_eq!(token.unwrap().text, "<b>");
        assert!(notes[0].contains("\"<missing>\", which is not in the vocabulary"));
        assert!(
            notes
                .iter()
                .any(|note| note == "config.json names \"<a>\" instead")
        );
    }
}
