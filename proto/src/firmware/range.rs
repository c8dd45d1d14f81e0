//! Ranges of firmware versions: `>=3.8.0-b3,<3.9`, `3.8.*`, `=(none)`. They compare by the order of versions alone.
//!
//! Read [`Range`] first. A range is parsed once into spans of the order; matching never evaluates its conditions again.

use std::{cmp::Ordering, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    token::compare_text,
    version::{Numbered, Stage, Version},
};

/// Name of a missing firmware version in a range. A device that states this text is treated as if it stated none.
pub const MISSING: &str = "(none)";

/// Conditions on a firmware version that must all hold, joined by commas.
///
/// The operators compare in the order of [`Version`]. `3.8.*` matches each version whose release numbers begin with
/// 3.8, pre-releases included, and `!=3.8.*` all others. A version without a digit is matched only by `=` and the same
/// text, regardless of letter case and build metadata. A missing version is matched only by `=(none)`.
#[derive(Clone, Debug)]
pub struct Range {
    text: Box<str>,
    holds: Holds,
}

#[derive(Clone, Debug)]
enum Holds {
    Exact(Exact),
    /// Disjoint, not empty, in order.
    Spans(Vec<Span>),
}

/// A version without a place in the order of numbered versions.
#[derive(Clone, Debug)]
pub(crate) enum Exact {
    Missing,
    /// A text without a digit, without its build metadata.
    Text(Box<str>),
}

/// The versions from `start` (included) to `end` (excluded). A missing end is open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: Option<Cut>,
    pub(crate) end: Option<Cut>,
}

/// A place between versions.
#[derive(Clone, Debug)]
pub(crate) struct Cut {
    /// A version, from its first digit.
    text: Box<str>,
    release_len: usize,
    stage: Stage,
    side: Side,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    /// Before all pre-releases of the release; only the release numbers are compared.
    Floor,
    Before,
    After,
}

impl Range {
    /// Maximum length of a range, in bytes. A longer text is an error.
    pub const LEN_MAX: usize = 512;

    /// The text as written, without surrounding white space.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the range contains this version. `None` and blank text mean a missing version. Allocates nothing.
    #[must_use]
    pub fn matches(&self, firmware: Option<&str>) -> bool {
        let firmware = firmware.map_or("", str::trim);
        match &self.holds {
            Holds::Exact(exact) => exact.is(firmware),
            Holds::Spans(spans) => Version::of(firmware)
                .numbered()
                .is_some_and(|version| spans.iter().any(|span| span.holds(&version))),
        }
    }

    /// Whether both ranges contain the same versions, however they are written: `>= 3.8` and `>=v3.8.0`.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        match (&self.holds, &other.holds) {
            (Holds::Exact(left), Holds::Exact(right)) => left == right,
            (Holds::Spans(left), Holds::Spans(right)) => left == right,
            (Holds::Exact(_), Holds::Spans(_)) | (Holds::Spans(_), Holds::Exact(_)) => false,
        }
    }

    pub(crate) const fn exact(&self) -> Option<&Exact> {
        match &self.holds {
            Holds::Exact(exact) => Some(exact),
            Holds::Spans(_) => None,
        }
    }

    pub(crate) fn spans(&self) -> &[Span] {
        match &self.holds {
            Holds::Exact(_) => &[],
            Holds::Spans(spans) => spans,
        }
    }
}

/// Compares the text. Ranges that are written differently may contain the same versions.
impl PartialEq for Range {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Range {}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Range {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Range {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse()
            .map_err(|error| serde::de::Error::custom(format!("firmware range: {error}")))
    }
}

impl FromStr for Range {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        if text.len() > Self::LEN_MAX {
            return Err(RangeError::at(text, Self::LEN_MAX, Problem::TooLong));
        }
        if let Some(at) = text.find(char::is_control) {
            return Err(RangeError::at(text, at, Problem::ControlCharacter));
        }
        if text.trim().is_empty() {
            return Err(RangeError::at(text, 0, Problem::Empty));
        }
        let mut holds: Option<Holds> = None;
        let mut start = 0;
        for part in text.split(',') {
            let condition = parse_condition(text, start, part)?;
            start += part.len() + 1;
            holds = Some(match holds {
                None => condition,
                Some(others) => others.and(condition),
            });
        }
        let holds = holds.unwrap_or(Holds::Spans(Vec::new()));
        let text = text.trim().into();
        Ok(Self { text, holds })
    }
}

impl Holds {
    /// The intersection.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Exact(left), Self::Exact(right)) if left == right => Self::Exact(left),
            (Self::Spans(left), Self::Spans(right)) => {
                let pairs = left.iter().flat_map(|a| right.iter().map(move |b| a.and(b)));
                Self::Spans(pairs.filter(|span| !span.is_empty()).collect())
            }
            (Self::Exact(_), _) | (_, Self::Exact(_)) => Self::Spans(Vec::new()),
        }
    }
}

// === impl Exact ===

impl Exact {
    /// `firmware` is trimmed; an empty text means missing.
    pub(crate) fn is(&self, firmware: &str) -> bool {
        match self {
            Self::Missing => firmware.is_empty() || firmware.eq_ignore_ascii_case(MISSING),
            Self::Text(text) => Version::of(firmware)
                .text()
                .is_some_and(|stated| compare_text(stated, text).is_eq()),
        }
    }
}

impl PartialEq for Exact {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Missing, Self::Missing) => true,
            (Self::Text(left), Self::Text(right)) => compare_text(left, right).is_eq(),
            (Self::Missing, Self::Text(_)) | (Self::Text(_), Self::Missing) => false,
        }
    }
}

// === impl Span ===

impl Span {
    fn new(start: Option<Cut>, end: Option<Cut>) -> Self {
        Self { start, end }
    }

    fn holds(&self, version: &Numbered<'_>) -> bool {
        self.start.as_ref().is_none_or(|start| start.is_reached(version))
            && !self.end.as_ref().is_some_and(|end| end.is_reached(version))
    }

    fn is_empty(&self) -> bool {
        matches!((&self.start, &self.end), (Some(start), Some(end)) if start >= end)
    }

    fn and(&self, other: &Self) -> Self {
        let end = match (&self.end, &other.end) {
            (Some(left), Some(right)) => Some(left.min(right)),
            (left, right) => left.as_ref().or(right.as_ref()),
        };
        // `None` sorts before every start, as an open start does.
        Self::new(self.start.as_ref().max(other.start.as_ref()).cloned(), end.cloned())
    }
}

// === impl Cut ===

impl Cut {
    fn new(version: Numbered<'_>, side: Side) -> Self {
        Self {
            text: [version.release, version.suffix].concat().into(),
            release_len: version.release.len(),
            stage: version.stage,
            side,
        }
    }

    /// Whether `version` sorts after this place.
    pub(crate) fn is_reached(&self, version: &Numbered<'_>) -> bool {
        let own = self.version();
        let order = own.compare_release(version).then_with(|| match self.side {
            Side::Floor => Ordering::Less,
            Side::Before | Side::After => own.compare_suffix(version),
        });
        order.is_lt() || (order.is_eq() && self.side == Side::Before)
    }

    fn version(&self) -> Numbered<'_> {
        let (release, suffix) = self.text.split_at(self.release_len);
        Numbered {
            release,
            stage: self.stage,
            suffix,
        }
    }
}

impl Ord for Cut {
    fn cmp(&self, other: &Self) -> Ordering {
        let (left, right) = (self.version(), other.version());
        left.compare_release(&right)
            .then_with(|| match (self.side, other.side) {
                (Side::Floor, _) | (_, Side::Floor) => self.side.cmp(&other.side),
                (left_side, right_side) => left.compare_suffix(&right).then(left_side.cmp(&right_side)),
            })
    }
}

impl PartialOrd for Cut {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Cut {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Cut {}

// === parsing ===

#[derive(Clone, Copy)]
enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// Parses the condition `part`, which begins at byte `start` of `text`.
fn parse_condition(text: &str, start: usize, part: &str) -> Result<Holds, RangeError> {
    let start = start + part.len() - part.trim_start().len();
    let part = part.trim();
    let fail = |offset: usize, problem| Err(RangeError::at(text, start + offset, problem));
    let signs = part.len() - part.trim_start_matches(['<', '>', '=', '!', '~', '^']).len();
    let operator = match &part[..signs] {
        "" => None,
        "=" => Some(Operator::Equal),
        "!=" => Some(Operator::NotEqual),
        "<" => Some(Operator::Less),
        "<=" => Some(Operator::LessOrEqual),
        ">" => Some(Operator::Greater),
        ">=" => Some(Operator::GreaterOrEqual),
        other => return fail(0, Problem::UnknownOperator(other.into())),
    };
    let operand = part[signs..].trim_start();
    let offset = part.len() - operand.len();
    if operand.is_empty() {
        return fail(offset, Problem::NoVersion);
    }
    if let Some(at) = find_second_operator(operand) {
        return fail(offset + at, Problem::NoComma);
    }
    if let Some(at) = operand.find('*') {
        return match (operator, wildcard(operand)) {
            (None, Some(inside)) => Ok(Holds::Spans(vec![inside])),
            (Some(Operator::NotEqual), Some(inside)) => Ok(Holds::Spans(outside(inside).into())),
            (_, Some(_) | None) => fail(offset + at, Problem::Wildcard),
        };
    }
    let Some(operator) = operator else {
        let has_place = Version::of(operand).numbered().is_some();
        let problem = if has_place {
            Problem::NoOperator
        } else {
            Problem::NoOperatorOrNumber
        };
        return fail(offset, problem(operand.into()));
    };
    let version = Version::of(operand);
    match (operator, version.numbered()) {
        (_, Some(version)) => Ok(Holds::Spans(compared(operator, version))),
        (Operator::Equal, None) if operand.eq_ignore_ascii_case(MISSING) => Ok(Holds::Exact(Exact::Missing)),
        (Operator::Equal, None) => Ok(Holds::Exact(Exact::Text(version.text().unwrap_or(operand).into()))),
        (Operator::NotEqual, None) => Ok(Holds::Spans(vec![Span::default()])),
        (Operator::Less | Operator::LessOrEqual | Operator::Greater | Operator::GreaterOrEqual, None) => {
            fail(offset, Problem::NoNumber(operand.into()))
        }
    }
}

/// Position of an operator inside a version: a comma is missing before it.
fn find_second_operator(operand: &str) -> Option<usize> {
    let mut is_after_space = false;
    for (at, character) in operand.char_indices() {
        if matches!(character, '<' | '>') || (is_after_space && matches!(character, '=' | '!')) {
            return Some(at);
        }
        is_after_space = character.is_whitespace();
    }
    None
}

fn compared(operator: Operator, version: Numbered<'_>) -> Vec<Span> {
    let (before, after) = (Cut::new(version, Side::Before), Cut::new(version, Side::After));
    match operator {
        Operator::Equal => vec![Span::new(Some(before), Some(after))],
        Operator::NotEqual => outside(Span::new(Some(before), Some(after))).into(),
        Operator::Less => vec![Span::new(None, Some(before))],
        Operator::LessOrEqual => vec![Span::new(None, Some(after))],
        Operator::Greater => vec![Span::new(Some(after), None)],
        Operator::GreaterOrEqual => vec![Span::new(Some(before), None)],
    }
}

/// The two spans outside of a span that has both ends.
fn outside(inside: Span) -> [Span; 2] {
    [Span::new(None, inside.start), Span::new(inside.end, None)]
}

/// `3.8.*`: release numbers, then `.*`, and nothing else.
fn wildcard(operand: &str) -> Option<Span> {
    let release = operand.strip_suffix(".*")?;
    if release.contains(['*', '+']) {
        return None;
    }
    let first = Version::of(release).numbered()?;
    // A hexadecimal number is the whole release.
    if !first.suffix.is_empty() || first.release.contains(['x', 'X']) {
        return None;
    }
    let next = next_release(first.release);
    let next = Numbered::of(&next);
    Some(Span::new(
        Some(Cut::new(first, Side::Floor)),
        Some(Cut::new(next, Side::Floor)),
    ))
}

/// Adds one to the last release number, which may have any length.
fn next_release(release: &str) -> String {
    let last = release.rfind(|character: char| !character.is_ascii_digit());
    let (head, number) = release.split_at(last.map_or(0, |at| at + 1));
    let nines = number.len() - number.trim_end_matches('9').len();
    let (kept, zeros) = (&number[..number.len() - nines], "0".repeat(nines));
    match kept.as_bytes().last() {
        None => format!("{head}1{zeros}"),
        Some(digit) => format!("{head}{}{}{zeros}", &kept[..kept.len() - 1], char::from(digit + 1)),
    }
}

// === errors ===

/// An error in the text of a range, and its position.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at character {position}: {problem}")]
pub struct RangeError {
    /// Counted in characters, from 1.
    pub position: usize,
    pub problem: Problem,
}

impl RangeError {
    fn at(text: &str, byte: usize, problem: Problem) -> Self {
        let ahead = text.char_indices().take_while(|(at, _)| *at < byte);
        Self {
            position: ahead.count() + 1,
            problem,
        }
    }
}

/// An error in the text of a range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("the range is empty; leave it out to match every version")]
    Empty,
    #[error("the range is longer than {max} bytes", max = Range::LEN_MAX)]
    TooLong,
    #[error("control characters are not allowed")]
    ControlCharacter,
    #[error("unknown operator `{0}`; expected one of = != < <= > >=")]
    UnknownOperator(Box<str>),
    #[error("a version needs an operator, as in `={0}` or `>={0}`")]
    NoOperator(Box<str>),
    #[error("a version needs an operator, as in `={0}`")]
    NoOperatorOrNumber(Box<str>),
    #[error("a version is expected here")]
    NoVersion,
    #[error("a new condition needs a comma in front of it")]
    NoComma,
    #[error("`*` stands only for what follows release numbers, as in `3.8.*` or `!=3.8.*`")]
    Wildcard,
    #[error("`{0}` has no digit, so it has no place in a range; only `=` and `!=` take it")]
    NoNumber(Box<str>),
}
