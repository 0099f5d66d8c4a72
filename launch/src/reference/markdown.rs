//! Markdown pages: wrapped paragraphs, lists and tables.

/// Longest line outside of tables.
const WIDTH: usize = 100;

/// A page under construction.
pub(super) struct Page {
    text: String,
}

impl Page {
    /// Begins a page that is generated from `source`.
    pub(super) fn new(title: &str, source: &str) -> Page {
        Page {
            text: format!(
                "<!-- Generated from {source} by `cargo x fix`. Do not edit. -->\n\n# {title}\n"
            ),
        }
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }

    /// Adds a heading; 2 is the level below the title.
    pub(super) fn heading(&mut self, level: usize, text: &str) {
        let marks = "#".repeat(level);
        self.text += &format!("\n{marks} {text}\n");
    }

    /// Adds a text; blank lines separate its paragraphs.
    pub(super) fn paragraphs(&mut self, text: &str) {
        for paragraph in text.split("\n\n") {
            self.text.push('\n');
            self.wrapped("", &escaped(paragraph));
        }
    }

    pub(super) fn list(&mut self, items: &[String]) {
        self.text.push('\n');
        for item in items {
            self.wrapped("- ", item);
        }
    }

    /// Adds a block of code.
    pub(super) fn code(&mut self, text: &str) {
        self.text += &format!("\n```text\n{}\n```\n", text.trim_end());
    }

    /// Adds a table. Cells are Markdown.
    pub(super) fn table(&mut self, columns: &[&str], rows: &[Vec<String>]) {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let header: Vec<String> = columns.iter().map(|name| name.to_string()).collect();
        let rule = vec!["---".to_string(); columns.len()];
        self.text.push('\n');
        self.text += &line(&header);
        self.text += &format!("|{}|\n", rule.join("|"));
        for row in rows {
            let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            self.text += &line(&cells);
        }
    }

    /// Adds words in lines of at most [`WIDTH`] columns, the first of which begins with `mark`.
    fn wrapped(&mut self, mark: &str, text: &str) {
        let indent = " ".repeat(mark.len());
        let mut line = mark.to_string();
        let mut is_empty = true;
        for word in text.split_whitespace() {
            let len = line.chars().count() + 1 + word.chars().count();
            if !is_empty && len > WIDTH {
                self.text += line.trim_end();
                self.text.push('\n');
                line = indent.clone();
                is_empty = true;
            }
            if !is_empty {
                line.push(' ');
            }
            line += word;
            is_empty = false;
        }
        self.text += line.trim_end();
        self.text.push('\n');
    }
}

/// Returns text in the form of code.
pub(super) fn code(text: &str) -> String {
    format!("`{text}`")
}

/// Returns text of a doc comment as one line of Markdown, for cells and list items.
pub(super) fn inline(text: &str) -> String {
    escaped(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Escapes `<` outside of code, except at the beginning of an address.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for (index, part) in text.split('`').enumerate() {
        let is_code = index % 2 == 1;
        if index > 0 {
            escaped.push('`');
        }
        if is_code {
            escaped += part;
            continue;
        }
        for (number, piece) in part.split('<').enumerate() {
            if number > 0 {
                let is_address = piece.starts_with("http");
                escaped += if is_address { "<" } else { "&lt;" };
            }
            escaped += piece;
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_wrapped_and_tables_are_not() {
        let mut page = Page::new("Title", "tests");
        let words = "word ".repeat(40);
        page.paragraphs(&words);
        page.list(&[words.clone()]);
        page.table(&["a", "b"], &[vec!["x | y".into(), words]]);
        let text = page.into_text();
        let (table, lines): (Vec<&str>, Vec<&str>) =
            text.lines().partition(|line| line.starts_with('|'));
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{text}");
        assert_eq!(table[..2], ["| a | b |", "|---|---|"]);
        assert!(table[2].starts_with("| x \\| y | word"), "{text}");
        assert!(text.contains("\n- word word"), "{text}");
        assert!(text.contains("\n  word word"), "{text}");
    }

    #[test]
    fn only_addresses_and_code_keep_their_angle_brackets() {
        let text = "see <https://a.b>,\n`Vec<u8>` and <x>";
        assert_eq!(inline(text), "see <https://a.b>, `Vec<u8>` and &lt;x>");
    }
}
