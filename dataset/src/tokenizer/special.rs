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

/// Finds the token of an option. A number is an id, never the text of a token.
fn find_by_option(flag: &str, text: &str, tokens: &dyn Tokens) -> Result<Token, String> {
    let by_text = tokens.by_text(text);
    let found = match text.parse::<u32>() {
        Ok(id) => {
            let by_id = tokens.by_id(id);
            if let Some(token) = by_text.filter(|token| token.special.id != id) {
                let other = match &by_id {
                    Some(token) => format!("is the id of {:?}", token.special.text),
                    None => "is no id of a token".into(),
                };
                return Err(format!(
                    "{flag} {text} is ambiguous: {text} {other}, and {text:?} is the text of the \
                     token {}; give the text or the id of another token",
                    token.special.id
                ));
            }
            by_id
        }
        Err(_) => by_text,
    };
    found.ok_or_else(|| {
        format!(
            "{flag} {text}: the tokenizer has no such token; {}",
            listed(tokens)
        )
    })
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
/// If the option's token is not in the vocabulary, or the option is ambiguous.
pub(super) fn choose_end(
    option: Option<&str>,
    named: &[Named],
    tokens: &dyn Tokens,
    notes: &mut Vec<String>,
) -> Result<Option<Special>, String> {
    choose(Role::End, option, named, tokens, &|_| true, notes)
}

/// A tokenizer's own rules for the beginning of texts.
#[derive(Debug, Clone, Default)]
pub(super) struct StartRules {
    /// `add_bos_token` of the configuration.
    pub(super) adds: Option<bool>,
    /// True if the configuration has `bos_token: null`.
    pub(super) is_null: bool,
    /// Texts of the tokens that the post-processor puts before a text.
    pub(super) template: Vec<String>,
}

/// Value of `--bos` for documents without a token at their beginning.
pub(super) const NO_TOKEN: &str = "none";

/// Chooses the token that begins documents and appends notes for the user.
///
/// A token that files or the vocabulary name is used only if the tokenizer itself adds it to texts.
/// The end of documents never begins them: models would see it twice between documents.
///
/// # Errors
/// If the option's token is not in the vocabulary or is the end of documents, or the option is
/// ambiguous.
pub(super) fn choose_start(
    option: Option<&str>,
    named: &[Named],
    rules: &StartRules,
    end: &Special,
    tokens: &dyn Tokens,
    notes: &mut Vec<String>,
) -> Result<Option<Special>, String> {
    if option == Some(NO_TOKEN) {
        notes.push("no token begins documents, by --bos none".into());
        return Ok(None);
    }
    if option.is_some() {
        let chosen = choose(Role::Start, option, named, tokens, &|_| true, notes)?;
        if chosen.as_ref() == Some(end) {
            return Err(format!(
                "--bos {:?}: the same token ends documents; give --bos none, or another token",
                end.text
            ));
        }
        return Ok(chosen);
    }
    let refused = match rules {
        StartRules {
            adds: Some(false), ..
        } => Some("its files say that texts begin without one"),
        StartRules {
            is_null: true,
            adds: None,
            ..
        } => Some("its configuration has bos_token: null"),
        _ => None,
    };
    if let Some(reason) = refused {
        notes.push(format!(
            "no token begins documents: {reason} (choose one with --bos)"
        ));
        return Ok(None);
    }
    let is_added =
        |token: &Special| rules.adds == Some(true) || rules.template.contains(&token.text);
    let accepts = |token: &Special| is_added(token) && token.id != end.id;
    let chosen = choose(Role::Start, None, named, tokens, &accepts, notes)?;
    if chosen.is_none() {
        let found = named.iter().filter_map(|name| find(tokens, &name.token));
        let mut found = found
            .map(|token| token.special)
            .chain(known(Role::Start, tokens));
        if let Some(other) = found.find(|token| token.id != end.id) {
            notes.push(format!(
                "no token begins documents: the tokenizer has {:?} but does not add it to texts \
                 (choose it with --bos)",
                other.text
            ));
        }
    }
    Ok(chosen)
}

/// `accepts` limits the choice among tokens that no option names.
fn choose(
    role: Role,
    option: Option<&str>,
    named: &[Named],
    tokens: &dyn Tokens,
    accepts: &dyn Fn(&Special) -> bool,
    notes: &mut Vec<String>,
) -> Result<Option<Special>, String> {
    let verb = role.verb();
    let flag = role.option();
    if let Some(text) = option {
        let token = find_by_option(flag, text, tokens)?;
        warn_of(role, &token, notes);
        notes.push(chosen(role, &token.special, &format!("by {flag}")));
        return Ok(Some(token.special));
    }
    let mut known = known(role, tokens);
    known.retain(accepts);
    for name in named {
        let Some(token) = find(tokens, &name.token) else {
            notes.push(format!(
                "{} names {}, which is not in the vocabulary",
                name.file,
                described(&name.token)
            ));
            continue;
        };
        if !accepts(&token.special) {
            continue;
        }
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
        let chosen = choose_end(option, named, &tokens, &mut notes).unwrap();
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
        let refused = |vocabulary, option| {
            choose_end(Some(option), &[], &Vocabulary(vocabulary), &mut Vec::new()).unwrap_err()
        };
        let error = refused(tokens, "x");
        assert!(error.contains("--eos x") && error.contains("<|endoftext|>, <|im_end|>"));
        // The text of one token and the id of another.
        let digits = &["2", "1", "*</s>"];
        let error = refused(digits, "2");
        assert!(
            error.contains("2 is the id of \"</s>\", and \"2\" is the text of the token 0"),
            "{error}"
        );
        assert_eq!(end(digits, Some("1"), &[]).0, "1");
        assert_eq!(end(digits, Some("0"), &[]).0, "2");
        assert!(refused(digits, "7").contains("no such token"));
        assert!(refused(&["9"], "9").contains("9 is no id of a token"));
    }

    #[test]
    fn documents_begin_only_with_a_token_that_the_tokenizer_adds() {
        let tokens = &["*<s>", "*</s>", "*<b>", "none"];
        let start = |option: Option<&str>, named: &[Named], rules: &StartRules, end: &str| {
            let vocabulary = Vocabulary(tokens);
            let end = vocabulary.by_text(end).unwrap().special;
            let mut notes = Vec::new();
            let chosen = choose_start(option, named, rules, &end, &vocabulary, &mut notes);
            chosen.map(|token| (token.map(|token| token.text), notes.join("\n")))
        };
        let rules = |adds, is_null, template: &[&str]| StartRules {
            adds,
            is_null,
            template: template.iter().map(|text| text.to_string()).collect(),
        };
        let config = [name("tokenizer_config.json", "<s>")];
        let text = |rules: StartRules| start(None, &config, &rules, "</s>").unwrap().0;
        assert_eq!(text(rules(None, false, &[])), None);
        assert_eq!(text(rules(Some(true), false, &[])).as_deref(), Some("<s>"));
        assert_eq!(text(rules(None, false, &["<s>"])).as_deref(), Some("<s>"));
        assert_eq!(text(rules(None, false, &["<b>"])), None);
        assert_eq!(text(rules(Some(false), false, &["<s>"])), None);
        assert_eq!(text(rules(None, true, &["<s>"])), None);
        // A known name that no file has.
        let added = rules(None, false, &["<s>"]);
        let known = start(None, &[], &added, "</s>").unwrap();
        assert_eq!(known.0.as_deref(), Some("<s>"));
        let none = start(None, &config, &rules(None, false, &[]), "</s>")
            .unwrap()
            .1;
        assert!(none.contains("has \"<s>\" but does not add it"), "{none}");
        // The end of documents does not begin them.
        let both = rules(Some(true), false, &["<s>"]);
        assert_eq!(start(None, &config, &both, "<s>").unwrap().0, None);
        let error = start(Some("<s>"), &config, &both, "<s>").unwrap_err();
        assert!(error.contains("the same token ends documents"), "{error}");
        assert_eq!(start(Some("none"), &config, &both, "</s>").unwrap().0, None);
        let chosen = start(Some("<b>"), &config, &rules(Some(false), true, &[]), "</s>");
        assert_eq!(chosen.unwrap().0.as_deref(), Some("<b>"));
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
        let token = choose_end(None, &named, &Vocabulary(tokens), &mut notes).unwrap();
        assert_eq!(token.unwrap().text, "<b>");
        assert!(notes[0].contains("\"<missing>\", which is not in the vocabulary"));
        assert!(
            notes
                .iter()
                .any(|note| note == "config.json names \"<a>\" instead")
        );
    }
}
