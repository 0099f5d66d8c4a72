//! Prints of this program. These macros replace those of the standard library, so that no text from
//! a file or another process can control the terminal, wherever it is printed.

use crate::hint::printable;
use std::fmt::Arguments;

macro_rules! println {
    () => {
        $crate::terminal::print_line(format_args!(""))
    };
    ($($text:tt)*) => {
        $crate::terminal::print_line(format_args!($($text)*))
    };
}

macro_rules! print {
    ($($text:tt)*) => {
        $crate::terminal::print_text(format_args!($($text)*))
    };
}

macro_rules! eprintln {
    ($($text:tt)*) => {
        $crate::terminal::print_error_line(format_args!($($text)*))
    };
}

pub(crate) fn print_line(text: Arguments) {
    std::println!("{}", printable(&text.to_string()));
}

pub(crate) fn print_text(text: Arguments) {
    std::print!("{}", printable(&text.to_string()));
}

pub(crate) fn print_error_line(text: Arguments) {
    std::eprintln!("{}", printable(&text.to_string()));
}
