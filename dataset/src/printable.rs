//! Text from files, made safe for a terminal.

/// Escapes what makes a terminal do something else than show text: control characters except line
/// ends and tabs, and marks that change the direction of writing.
pub fn printable(text: &str) -> String {
    escape(text, |c| c == '\n' || c == '\t')
}

/// Like [`printable`], also for line ends and tabs: for names and values from files, which could
/// otherwise pretend to be a line of moerun.
pub fn one_line(text: &str) -> String {
    escape(text, |_| false)
}

fn escape(text: &str, keeps: fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if is_control(c) && !keeps(c) {
            match c {
                '\n' => escaped.push_str("\\n"),
                '\r' => escaped.push_str("\\r"),
                '\t' => escaped.push_str("\\t"),
                // The form of JSON: lines of JSON stay valid.
                c => escaped.push_str(&format!("\\u{:04x}", u32::from(c))),
            }
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// True for control characters, line and paragraph separators, and bidirectional marks.
fn is_control(c: char) -> bool {
    let is_mark = matches!(
        c,
        '\u{61c}'
            | '\u{200e}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}'
    );
    c.is_control() || is_mark
}

#[cfg(test)]
mod tests {
    use super::{one_line, printable};

    #[test]
    fn text_from_files_cannot_control_the_terminal() {
        let text = "a\u{1b}[31mred\r\u{7f}\u{9b}2J\u{202e}\n\tgrößer 模型 🙂";
        let shown = "a\\u001b[31mred\\r\\u007f\\u009b2J\\u202e\n\tgrößer 模型 🙂";
        assert_eq!(printable(text), shown);
        assert_eq!(
            one_line(text),
            shown.replace('\n', "\\n").replace('\t', "\\t")
        );
    }
}
