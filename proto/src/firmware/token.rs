//! The pieces that versions are compared by: numbers, words and `~`. No allocation anywhere.

use std::{cmp::Ordering, ops::RangeInclusive};

/// Words that sort before all other words: daily builds come before builds that were meant for somebody.
const EARLY_WORDS: [&str; 3] = ["dev", "nightly", "snapshot"];

/// Words that mark a build made after the release.
const POST_WORDS: [&str; 7] = ["fix", "hotfix", "p", "patch", "post", "r", "rev"];

/// Words that mark a build made after the release if a number follows them.
const NUMBERED_POST_WORDS: [&str; 8] = ["build", "h", "hf", "sp", "sr", "su", "u", "update"];

/// Pre-release word of two letters. Directly after a digit it is not a patch level such as OpenSSL's `1.0.2za`.
const SHORT_PRE_WORD: &str = "rc";

/// Words that mark the release itself. At the end they are not compared.
const RELEASE_WORDS: [&str; 7] = ["final", "ga", "lts", "prod", "rel", "release", "stable"];

/// Number of hexadecimal digits of a commit hash after a `g`, and without one.
const MARKED_HASH_LEN: RangeInclusive<usize> = 6..=40;
const HASH_LEN: RangeInclusive<usize> = 7..=40;

/// One piece of the text after the release numbers. Dots, hyphens and spaces only separate pieces.
#[derive(Clone, Copy, Debug)]
pub(super) enum Token<'a> {
    /// `~`: sorts before everything, even before the end of the text.
    Tilde,
    /// A run of ASCII digits.
    Number(&'a str),
    /// A run of characters other than ASCII digits, ASCII punctuation, spaces and control characters.
    Word(&'a str),
}

impl Token<'_> {
    /// Ranks the kinds: `~`, the end of the text, numbers, words.
    const fn rank(token: Option<Self>) -> u8 {
        match token {
            Some(Token::Tilde) => 0,
            None => 1,
            Some(Token::Number(_)) => 2,
            Some(Token::Word(_)) => 3,
        }
    }
}

/// Iterates over the pieces of a text, without what [`counted`] drops before each `~` and at the end.
#[derive(Clone, Debug)]
pub(super) struct Tokens<'a> {
    rest: &'a str,
    /// The text after `rest`, from the next `~`.
    after: &'a str,
}

impl<'a> Tokens<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        let (first, after) = text.split_at(text.find('~').unwrap_or(text.len()));
        Self {
            rest: counted(first),
            after,
        }
    }

    /// The remaining text up to the next `~`, separators included.
    pub(super) const fn rest(&self) -> &'a str {
        self.rest
    }

    fn take(&mut self, len: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        taken
    }
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        self.rest = self.rest.trim_start_matches(is_separator);
        let bytes = self.rest.as_bytes();
        let Some(first) = bytes.first() else {
            *self = Self::of(self.after.strip_prefix('~')?);
            return Some(Token::Tilde);
        };
        if first.is_ascii_digit() {
            let len = run(bytes, |byte| byte.is_ascii_digit());
            return Some(Token::Number(self.take(len)));
        }
        let len = run(bytes, is_word_byte);
        Some(Token::Word(self.take(len)))
    }
}

/// Compares two sequences of pieces. If one is the beginning of the other, the shorter one sorts first, unless a `~`
/// follows.
pub(super) fn compare_tokens(mut left: Tokens<'_>, mut right: Tokens<'_>) -> Ordering {
    loop {
        let (a, b) = (left.next(), right.next());
        let order = match (a, b) {
            (None, None) => return Ordering::Equal,
            (Some(Token::Number(a)), Some(Token::Number(b))) => compare_numbers(a, b),
            (Some(Token::Word(a)), Some(Token::Word(b))) => compare_words(a, b),
            (a, b) => Token::rank(a).cmp(&Token::rank(b)),
        };
        if order.is_ne() {
            return order;
        }
    }
}

/// Compares runs of digits, decimal or hexadecimal, as numbers of any length.
pub(super) fn compare_numbers(left: &str, right: &str) -> Ordering {
    let (left, right) = (left.trim_start_matches('0'), right.trim_start_matches('0'));
    let lower_case = |byte: u8| byte.to_ascii_lowercase();
    left.len()
        .cmp(&right.len())
        .then_with(|| left.bytes().map(lower_case).cmp(right.bytes().map(lower_case)))
}

/// Compares character by character, in lower case.
pub(super) fn compare_text(left: &str, right: &str) -> Ordering {
    if left.is_ascii() && right.is_ascii() {
        return left
            .bytes()
            .map(|byte| byte.to_ascii_lowercase())
            .cmp(right.bytes().map(|byte| byte.to_ascii_lowercase()));
    }
    left.chars()
        .flat_map(char::to_lowercase)
        .cmp(right.chars().flat_map(char::to_lowercase))
}

/// Whether this word marks a build made after the release. `next` is the piece after the word.
pub(super) fn is_post_word(word: &str, next: Option<Token<'_>>) -> bool {
    is_one_of(&POST_WORDS, word) || (is_one_of(&NUMBERED_POST_WORDS, word) && matches!(next, Some(Token::Number(_))))
}

/// Whether this word marks the release itself, so that what follows it tells whether a build was made before or after
/// the release: `2.4.4-RELEASE-p3` was made after it, `3.8.0-final-rc2` before.
pub(super) fn is_release_word(word: &str) -> bool {
    is_one_of(&RELEASE_WORDS, word)
}

/// Whether a word directly after a digit, and at the end, is a patch level, as in `1.1.1d` and `1.0.2za`.
pub(super) fn is_patch_level(word: &str) -> bool {
    match word.chars().count() {
        1 => true,
        2 => word.is_ascii() && !word.eq_ignore_ascii_case(SHORT_PRE_WORD),
        _ => false,
    }
}

/// The compared part of a version without `~`: without the commit hashes, remarks in round brackets and release words
/// at its end. Takes time in proportion to its length.
pub(super) fn counted(part: &str) -> &str {
    let mut counted = part;
    loop {
        let text = counted.trim_end_matches(|character| is_separator(character) && character != ')');
        let shorter = without_remark(text).or_else(|| {
            let text = text.trim_end_matches(is_separator);
            without_hash(text).or_else(|| without_release_word(text))
        });
        match shorter {
            Some(shorter) => counted = shorter,
            None => return counted,
        }
    }
}

/// The text before a remark in round brackets at the end of `text`.
///
/// A number in brackets directly after a digit, with or without one letter, is a part of the version instead:
/// `9.16(4)` and `12.4(25g)`.
pub(super) fn without_remark(text: &str) -> Option<&str> {
    let mut open = 0_usize;
    for (at, byte) in text.bytes().enumerate().rev() {
        match byte {
            b')' => open += 1,
            b'~' => return None,
            // The first character seen is the last one of the text.
            _ if open == 0 => return None,
            b'(' if open == 1 => return (!is_number_in_brackets(text, at)).then(|| &text[..at]),
            b'(' => open -= 1,
            _ => {}
        }
    }
    None
}

/// Whether the brackets from byte `at` to the end of `text` directly follow a digit, and hold digits and at most one
/// letter. A text that begins with them is a suffix, and so follows the digits of the release.
fn is_number_in_brackets(text: &str, at: usize) -> bool {
    let (head, inside) = (&text.as_bytes()[..at], &text.as_bytes()[at + 1..text.len() - 1]);
    let digits = run(inside, |byte| byte.is_ascii_digit());
    let is_number = digits > 0 && matches!(&inside[digits..], [] | [b'a'..=b'z' | b'A'..=b'Z']);
    is_number && head.last().is_none_or(u8::is_ascii_digit)
}

/// The text before a commit hash at the end of `text`, behind a character that only separates. The hash of
/// `git describe` belongs to a count of commits, and stays.
fn without_hash(text: &str) -> Option<&str> {
    let longest = text.len() - text.len().min(*HASH_LEN.end() + 2);
    let tail = &text.as_bytes()[longest..];
    let at = longest + tail.iter().rposition(|byte| is_separator(char::from(*byte)))?;
    let (head, hash) = (&text[..at], &text.as_bytes()[at + 1..]);
    let is_hash = match hash {
        [b'g' | b'G', digits @ ..] if is_hexadecimal(digits, &MARKED_HASH_LEN) => !ends_in_count(head),
        digits => {
            is_hexadecimal(digits, &HASH_LEN)
                && digits.iter().any(u8::is_ascii_digit)
                && digits.iter().any(u8::is_ascii_alphabetic)
        }
    };
    is_hash.then_some(head)
}

fn is_hexadecimal(digits: &[u8], len: &RangeInclusive<usize>) -> bool {
    len.contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit)
}

/// Whether `text` ends in a hyphen and a number, as before the hash of `git describe`.
fn ends_in_count(text: &str) -> bool {
    let head = text.trim_end_matches(|character: char| character.is_ascii_digit());
    head.len() < text.len() && head.ends_with('-')
}

/// The text before a release word at the end of `text`.
fn without_release_word(text: &str) -> Option<&str> {
    RELEASE_WORDS.iter().find_map(|word| {
        let at = text.len().checked_sub(word.len())?;
        let is_word = text.as_bytes()[at..].eq_ignore_ascii_case(word.as_bytes())
            && !text.as_bytes()[..at].last().is_some_and(|byte| is_word_byte(*byte));
        is_word.then(|| &text[..at])
    })
}

fn is_one_of(words: &[&str], word: &str) -> bool {
    words.iter().any(|one| word.eq_ignore_ascii_case(one))
}

/// Whether `text` begins with the hash of `git describe`: `g` and at least two hexadecimal digits (so that `ga` stays a
/// word), with no letter or digit directly after them.
pub(super) fn starts_with_git_hash(text: &str) -> bool {
    let bytes = text.as_bytes();
    if !matches!(bytes.first(), Some(b'g' | b'G')) {
        return false;
    }
    let digits = run(&bytes[1..], |byte| byte.is_ascii_hexdigit());
    let glued = bytes
        .get(1 + digits)
        .is_some_and(|byte| byte.is_ascii_digit() || is_word_byte(*byte));
    digits >= 2 && !glued
}

fn compare_words(left: &str, right: &str) -> Ordering {
    let is_late = |word: &str| !is_one_of(&EARLY_WORDS, word);
    is_late(left)
        .cmp(&is_late(right))
        .then_with(|| compare_text(left, right))
}

fn run(bytes: &[u8], belongs: impl Fn(u8) -> bool) -> usize {
    bytes.iter().position(|byte| !belongs(*byte)).unwrap_or(bytes.len())
}

/// Bytes of characters beyond ASCII are part of words, so that a word always ends at a character boundary.
const fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || !byte.is_ascii()
}

const fn is_separator(character: char) -> bool {
    character.is_ascii() && !character.is_ascii_alphanumeric() && character != '~'
}
