//! The pieces that versions are compared by: numbers, words and `~`. No allocation anywhere.

use std::cmp::Ordering;

/// Words that sort before all other words: what is built every day comes before what was meant for somebody.
const EARLY_WORDS: [&str; 3] = ["dev", "nightly", "snapshot"];

/// Words that begin what comes after a release.
const POST_WORDS: [&str; 7] = ["fix", "hotfix", "p", "patch", "post", "r", "rev"];

/// One piece of what stands behind the release numbers. Everything between pieces (dots, hyphens, spaces) only separates them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Token<'a> {
    /// `~`: before everything, even before the end.
    Tilde,
    /// A run of ASCII digits.
    Number(&'a str),
    /// A run of anything else that is no ASCII punctuation, space or control character.
    Word(&'a str),
}

impl Token<'_> {
    /// Ranks the kinds: `~`, then the end of the text, then numbers, then words.
    const fn rank(token: Option<Self>) -> u8 {
        match token {
            Some(Token::Tilde) => 0,
            None => 1,
            Some(Token::Number(_)) => 2,
            Some(Token::Word(_)) => 3,
        }
    }
}

/// Walks through the pieces of a text.
#[derive(Clone, Debug)]
pub(super) struct Tokens<'a> {
    rest: &'a str,
}

impl<'a> Tokens<'a> {
    pub(super) const fn of(text: &'a str) -> Self {
        Self { rest: text }
    }

    /// What has not been walked through yet, separators included.
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
        let first = bytes.first()?;
        if *first == b'~' {
            self.take(1);
            return Some(Token::Tilde);
        }
        if first.is_ascii_digit() {
            let len = run(bytes, |byte| byte.is_ascii_digit());
            return Some(Token::Number(self.take(len)));
        }
        let len = run(bytes, is_word_byte);
        Some(Token::Word(self.take(len)))
    }
}

/// Compares two rows of pieces; where one row is the beginning of the other, the shorter one is first, but for a `~`.
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

/// Compares runs of ASCII digits as numbers, of any length.
pub(super) fn compare_numbers(left: &str, right: &str) -> Ordering {
    let (left, right) = (left.trim_start_matches('0'), right.trim_start_matches('0'));
    left.len().cmp(&right.len()).then_with(|| left.cmp(right))
}

/// Compares letter by letter, in lower case.
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

/// Whether what follows a release under this word is later than the release.
pub(super) fn is_post_word(word: &str) -> bool {
    POST_WORDS.iter().any(|post| word.eq_ignore_ascii_case(post))
}

/// Whether `text` begins with the hash of `git describe`: `g` and at least two hexadecimal digits (so that `ga` stays a word), nothing glued to them.
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
    let is_late = |word: &str| !EARLY_WORDS.iter().any(|early| word.eq_ignore_ascii_case(early));
    is_late(left)
        .cmp(&is_late(right))
        .then_with(|| compare_text(left, right))
}

fn run(bytes: &[u8], belongs: impl Fn(u8) -> bool) -> usize {
    bytes.iter().position(|byte| !belongs(*byte)).unwrap_or(bytes.len())
}

/// Bytes of characters beyond ASCII are part of words, so that a run of them always ends between two characters.
const fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || !byte.is_ascii()
}

const fn is_separator(character: char) -> bool {
    character.is_ascii() && !character.is_ascii_alphanumeric() && character != '~'
}
