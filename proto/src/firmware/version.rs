//! The order of firmware versions (docs/VERSIONS.md): what people mean, not SemVer. Every text has a place in it.
//!
//! Read [`Version`] first. A text is split into its compared parts, and versions compare part by part. Each part has a
//! total order, so versions have one.

use std::{cmp::Ordering, fmt};

use super::token::{
    Token, Tokens, compare_numbers, compare_text, compare_tokens, counted, is_patch_level, is_post_word,
    is_release_word, starts_with_git_hash, without_remark,
};

/// Marks a hexadecimal number, in either letter case.
const HEXADECIMAL: &str = "0x";

/// Compares two firmware texts as [`Version`]s. Total for any text, never fails, allocates nothing, takes time in
/// proportion to the length of the texts.
#[must_use]
pub fn compare(left: &str, right: &str) -> Ordering {
    Version::of(left).cmp(&Version::of(right))
}

/// The compared parts of a firmware text, borrowed from the text.
///
/// Equality is that of the order: `v3.8` and `3.8.0+build5` are equal. A total preorder over texts, and a total order
/// over their compared parts.
#[derive(Clone, Copy, Debug)]
pub struct Version<'a> {
    form: Form<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Form<'a> {
    /// A text without a digit. It sorts before all numbered versions, by its lower-case text.
    Text(&'a str),
    Numbered(Numbered<'a>),
}

/// A version with release numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbered<'a> {
    /// From the first digit to the last digit of the release numbers.
    pub(super) release: &'a str,
    pub(super) stage: Stage,
    /// The text after the release numbers, without build metadata, with what [`counted`] drops.
    pub(super) suffix: &'a str,
}

/// Position of a version relative to its own release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Before,
    Release,
    After,
}

impl<'a> Version<'a> {
    /// Parses `text`. Surrounding white space, letter case and build metadata (from the first `+` after other text) are
    /// ignored.
    #[must_use]
    pub fn of(text: &'a str) -> Self {
        let text = without_metadata(without_last_remark(text.trim()));
        let form = match text.find(|character: char| character.is_ascii_digit()) {
            None => Form::Text(text),
            Some(start) => Form::Numbered(Numbered::of(&text[start..])),
        };
        Self { form }
    }

    /// A text that is known to have no digit and no build metadata.
    pub(crate) const fn of_text(text: &'a str) -> Self {
        Self { form: Form::Text(text) }
    }

    /// Whether the text has release numbers. Texts without them sort first, and only an exact range matches them.
    #[must_use]
    pub const fn is_numbered(&self) -> bool {
        matches!(self.form, Form::Numbered(_))
    }

    pub(crate) const fn numbered(self) -> Option<Numbered<'a>> {
        match self.form {
            Form::Text(_) => None,
            Form::Numbered(numbered) => Some(numbered),
        }
    }

    /// Writes a text that is the same for two versions if and only if they are equal.
    ///
    /// # Errors
    /// Writing to `text` failed.
    pub(crate) fn write_canonical(&self, text: &mut impl fmt::Write) -> fmt::Result {
        match &self.form {
            Form::Text(stated) => write_lower_case(stated, text),
            Form::Numbered(version) => version.write_canonical(text),
        }
    }

    /// The compared part of a text without a digit.
    pub(crate) const fn text(self) -> Option<&'a str> {
        match self.form {
            Form::Text(text) => Some(text),
            Form::Numbered(_) => None,
        }
    }
}

impl<'a> Numbered<'a> {
    /// `text` begins with a digit and has no build metadata.
    pub(super) fn of(text: &'a str) -> Self {
        // A commit hash after a dot, or after the hyphen of a date, would look like a release number.
        let first = counted(text.split('~').next().unwrap_or_default());
        let (release_len, ends_in_build_number) = match hexadecimal(first) {
            Some(digits) => (HEXADECIMAL.len() + digits.len(), false),
            None => scan_release(first.as_bytes()),
        };
        let (release, suffix) = text.split_at(release_len);
        let stage = stage_of(suffix, ends_in_build_number);
        Self { release, stage, suffix }
    }

    /// `3.8=`, `3.8<.b.3`, `3.8>.4`: release numbers without trailing zeros, the stage, and the pieces of the suffix.
    fn write_canonical(&self, text: &mut impl fmt::Write) -> fmt::Result {
        if hexadecimal(self.release).is_some() {
            text.write_str(HEXADECIMAL)?;
        }
        let mut zeros = 0;
        let mut separator = "";
        for digits in release_numbers(self.release) {
            if digits.is_empty() {
                zeros += 1;
                continue;
            }
            for part in std::iter::repeat_n("0", std::mem::take(&mut zeros)).chain([digits]) {
                text.write_str(separator)?;
                write_lower_case(part, text)?;
                separator = ".";
            }
        }
        // No text without a digit has this form.
        if separator.is_empty() {
            text.write_str("0")?;
        }
        text.write_str(match self.stage {
            Stage::Before => "<",
            Stage::Release => "=",
            Stage::After => ">",
        })?;
        for token in Tokens::of(self.suffix) {
            match token {
                Token::Tilde => text.write_str("~")?,
                Token::Number(digits) => {
                    text.write_str(".")?;
                    text.write_str(digits.trim_start_matches('0'))?;
                }
                Token::Word(word) => {
                    text.write_str(".")?;
                    write_lower_case(word, text)?;
                }
            }
        }
        Ok(())
    }

    /// Compares the release numbers only.
    pub(super) fn compare_release(&self, other: &Self) -> Ordering {
        compare_releases(self.release, other.release)
    }

    /// Compares what follows the release numbers. Meaningful only if these are equal.
    pub(super) fn compare_suffix(&self, other: &Self) -> Ordering {
        self.stage
            .cmp(&other.stage)
            .then_with(|| compare_tokens(Tokens::of(self.suffix), Tokens::of(other.suffix)))
    }
}

impl Ord for Version<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        match (&self.form, &other.form) {
            (Form::Text(left), Form::Text(right)) => compare_text(left, right),
            (Form::Text(_), Form::Numbered(_)) => Ordering::Less,
            (Form::Numbered(_), Form::Text(_)) => Ordering::Greater,
            (Form::Numbered(left), Form::Numbered(right)) => {
                left.compare_release(right).then_with(|| left.compare_suffix(right))
            }
        }
    }
}

impl PartialOrd for Version<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Version<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Version<'_> {}

fn write_lower_case(word: &str, text: &mut impl fmt::Write) -> fmt::Result {
    word.chars()
        .flat_map(char::to_lowercase)
        .try_for_each(|character| text.write_char(character))
}

/// Removes a remark in round brackets from the end of a version: a `+` in it does not begin build metadata.
fn without_last_remark(text: &str) -> &str {
    match without_remark(text) {
        Some(head) if head.contains(|character: char| character.is_ascii_digit()) => head.trim_end(),
        Some(_) | None => text,
    }
}

/// Cuts at the first `+` that has text before it: a leading `+` is a prefix like any other.
fn without_metadata(text: &str) -> &str {
    let signs = text.len() - text.trim_start_matches('+').len();
    match text[signs..].find('+') {
        Some(at) => text[..signs + at].trim_end(),
        None => text,
    }
}

/// Length of the release numbers at the start of `bytes`, and whether a hyphen precedes the last of them.
///
/// Numbers are separated by dots. If the first one has four digits (a year), a hyphen, `_` or `/` between digits
/// separates as well.
fn scan_release(bytes: &[u8]) -> (usize, bool) {
    let digits_from = |start: usize| bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let mut end = digits_from(0);
    let is_dated = end == 4;
    let mut ends_in_build_number = false;
    loop {
        let dots = bytes[end..].iter().take_while(|byte| **byte == b'.').count();
        let is_hyphen = matches!(bytes.get(end), Some(b'-' | b'_' | b'/'));
        let divider = if is_dated && is_hyphen { 1 } else { dots };
        let digits = digits_from(end + divider);
        if divider == 0 || digits == 0 {
            return (end, ends_in_build_number);
        }
        end += divider + digits;
        ends_in_build_number = is_hyphen;
    }
}

/// The digits of a version that is one hexadecimal number, as Zigbee's file versions are: `0x264a0700`. None where
/// other letters or digits follow directly.
fn hexadecimal(text: &str) -> Option<&str> {
    // Hardly any version is marked, and each comparison asks.
    let digits = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => &text[HEXADECIMAL.len()..],
        _ => return None,
    };
    let len = digits.find(|character: char| !character.is_ascii_hexdigit());
    let (digits, rest) = digits.split_at(len.unwrap_or(digits.len()));
    let is_glued = rest.starts_with(|character: char| character.is_alphanumeric() || !character.is_ascii());
    (!digits.is_empty() && !is_glued).then_some(digits)
}

/// Stage of a version, by the text after its release numbers up to a `~`.
///
/// `after_build_number`: a hyphen precedes the last release number, so a hash after it is that of `git describe`.
fn stage_of(suffix: &str, after_build_number: bool) -> Stage {
    let mut tokens = Tokens::of(suffix);
    let mut has_build_number = false;
    loop {
        let ahead = tokens.rest();
        match tokens.next() {
            Some(Token::Number(_)) => has_build_number = true,
            None | Some(Token::Tilde) if has_build_number => return Stage::After,
            None => return Stage::Release,
            Some(Token::Tilde) => return Stage::Before,
            Some(Token::Word(word)) => {
                let is_glued = ahead.starts_with(word);
                let next = tokens.clone().next();
                if is_release_word(word) && matches!(next, Some(Token::Number(_) | Token::Word(_))) {
                    continue;
                }
                let is_last = matches!(next, None | Some(Token::Tilde));
                let is_level = is_glued && is_last && is_patch_level(word);
                let hash = &ahead[ahead.len() - tokens.rest().len() - word.len()..];
                let is_described = (has_build_number || after_build_number) && starts_with_git_hash(hash);
                return if is_level || is_post_word(word, next) || is_described {
                    Stage::After
                } else {
                    Stage::Before
                };
            }
        }
    }
}

/// The numbers of a release without leading zeros; zero is the empty text.
fn release_numbers(release: &str) -> impl Iterator<Item = &str> {
    let marked = hexadecimal(release);
    let is_hexadecimal = marked.is_some();
    marked
        .unwrap_or(release)
        .split(move |character: char| !(character.is_ascii_digit() || is_hexadecimal && character.is_ascii_hexdigit()))
        .filter(|digits| !digits.is_empty())
        .map(|digits| digits.trim_start_matches('0'))
}

/// Compares number by number; a missing number is zero. Of the same digits, decimal ones sort first.
fn compare_releases(left: &str, right: &str) -> Ordering {
    let (mut lefts, mut rights) = (release_numbers(left), release_numbers(right));
    loop {
        let (a, b) = (lefts.next(), rights.next());
        if a.is_none() && b.is_none() {
            return hexadecimal(left).is_some().cmp(&hexadecimal(right).is_some());
        }
        let order = compare_numbers(a.unwrap_or_default(), b.unwrap_or_default());
        if order.is_ne() {
            return order;
        }
    }
}
