//! Thresholds: expressions over the report's figures that must hold, such as `t99_seconds <= 1.1 * optimum_seconds`.
//!
//! A threshold is one comparison of two sums. Figures are named by their path in the report; the names are checked when the
//! scenario is read, so that a typing error fails at once and not after ten minutes. A figure that was not reached (a `null` in the
//! report, like the `t99_seconds` of devices that never came back) counts as not a number: every comparison with it fails.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

/// Longest threshold, in bytes: also bounds how deep brackets can nest.
const LEN_MAX: usize = 512;

/// Figures by their path; None where it was not reached.
pub type Figures = BTreeMap<String, Option<f64>>;

/// A comparison, parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Threshold {
    text: String,
    left: Term,
    comparison: Comparison,
    right: Term,
}

/// What came of a threshold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    pub expression: String,
    /// Value of the left side; None where a figure in it was not reached.
    pub left: Option<f64>,
    pub right: Option<f64>,
    pub passed: bool,
}

/// A threshold that can't be read, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem} at character {at} of `{text}`")]
pub struct ThresholdError {
    text: String,
    at: usize,
    problem: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Less,
    LessOrEqual,
    Equal,
    NotEqual,
    GreaterOrEqual,
    Greater,
}

#[derive(Clone, Debug, PartialEq)]
enum Term {
    Number(f64),
    Figure(String),
    Call(Function, Vec<Term>),
    Sum(Box<Term>, Operator, Box<Term>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    Min,
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
}

impl Threshold {
    /// # Errors
    /// It is not a comparison of two sums; says where.
    pub fn parse(text: &str) -> Result<Self, ThresholdError> {
        let mut reader = Reader { text, at: 0 };
        if text.len() > LEN_MAX {
            return Err(reader.error(format!("more than {LEN_MAX} characters")));
        }
        let left = reader.sum()?;
        let comparison = reader.comparison()?;
        let right = reader.sum()?;
        reader.skip_spaces();
        if reader.at < text.len() {
            return Err(reader.error("something behind the comparison"));
        }
        Ok(Self {
            text: text.to_owned(),
            left,
            comparison,
            right,
        })
    }

    /// The figures it names.
    #[must_use]
    pub fn figures(&self) -> Vec<&str> {
        let mut found = Vec::new();
        self.left.collect(&mut found);
        self.right.collect(&mut found);
        found
    }

    /// Does it hold? Fails where a figure is missing, not reached or not finite.
    #[must_use]
    pub fn judge(&self, figures: &Figures) -> Outcome {
        let (left, right) = (self.left.value(figures), self.right.value(figures));
        let passed = match (left, right) {
            (Some(left), Some(right)) => self.comparison.holds(left, right),
            _ => false,
        };
        Outcome {
            expression: self.text.clone(),
            left,
            right,
            passed,
        }
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Comparison {
    #[expect(clippy::float_cmp, reason = "`lost_sessions == 0` compares counts, which are exact")]
    fn holds(self, left: f64, right: f64) -> bool {
        match self {
            Self::Less => left < right,
            Self::LessOrEqual => left <= right,
            Self::Equal => left == right,
            Self::NotEqual => left != right,
            Self::GreaterOrEqual => left >= right,
            Self::Greater => left > right,
        }
    }
}

impl Term {
    fn collect<'a>(&'a self, found: &mut Vec<&'a str>) {
        match self {
            Self::Number(_) => {}
            Self::Figure(name) => found.push(name),
            Self::Call(_, terms) => terms.iter().for_each(|term| term.collect(found)),
            Self::Sum(left, _, right) => {
                left.collect(found);
                right.collect(found);
            }
        }
    }

    fn value(&self, figures: &Figures) -> Option<f64> {
        let value = match self {
            Self::Number(number) => *number,
            Self::Figure(name) => (*figures.get(name)?)?,
            Self::Call(function, terms) => {
                let values: Vec<f64> = terms.iter().map(|term| term.value(figures)).collect::<Option<_>>()?;
                let pick = match function {
                    Function::Min => f64::min,
                    Function::Max => f64::max,
                };
                values.into_iter().reduce(pick)?
            }
            Self::Sum(left, operator, right) => {
                let (left, right) = (left.value(figures)?, right.value(figures)?);
                match operator {
                    Operator::Add => left + right,
                    Operator::Subtract => left - right,
                    Operator::Multiply => left * right,
                    Operator::Divide => left / right,
                }
            }
        };
        value.is_finite().then_some(value)
    }
}

/// Reads from the left; `at` is a byte index on a character boundary.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl Reader<'_> {
    fn sum(&mut self) -> Result<Term, ThresholdError> {
        let mut left = self.product()?;
        loop {
            let operator = match self.peek() {
                Some('+') => Operator::Add,
                Some('-') => Operator::Subtract,
                _ => return Ok(left),
            };
            self.at += 1;
            left = Term::Sum(Box::new(left), operator, Box::new(self.product()?));
        }
    }

    fn product(&mut self) -> Result<Term, ThresholdError> {
        let mut left = self.factor()?;
        loop {
            let operator = match self.peek() {
                Some('*') => Operator::Multiply,
                Some('/') => Operator::Divide,
                _ => return Ok(left),
            };
            self.at += 1;
            left = Term::Sum(Box::new(left), operator, Box::new(self.factor()?));
        }
    }

    fn factor(&mut self) -> Result<Term, ThresholdError> {
        match self.peek() {
            Some('(') => {
                self.at += 1;
                let inner = self.sum()?;
                self.expect(')')?;
                Ok(inner)
            }
            Some(c) if c.is_ascii_digit() => {
                let digits = self.word(|c| c.is_ascii_digit() || matches!(c, '.' | '_'));
                match digits.replace('_', "").parse() {
                    Ok(number) => Ok(Term::Number(number)),
                    Err(_) => Err(self.error(format!("`{digits}` is not a number"))),
                }
            }
            Some(c) if c.is_ascii_alphabetic() => {
                let name = self.word(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_'));
                if self.peek() != Some('(') {
                    return Ok(Term::Figure(name));
                }
                let function = match name.as_str() {
                    "min" => Function::Min,
                    "max" => Function::Max,
                    _ => return Err(self.error(format!("no function `{name}`, only min and max, expected"))),
                };
                self.at += 1;
                let mut terms = vec![self.sum()?];
                while self.peek() == Some(',') {
                    self.at += 1;
                    terms.push(self.sum()?);
                }
                self.expect(')')?;
                Ok(Term::Call(function, terms))
            }
            _ => Err(self.error("expected a number, a figure or a bracket")),
        }
    }

    fn comparison(&mut self) -> Result<Comparison, ThresholdError> {
        const SIGNS: [(&str, Comparison); 6] = [
            ("<=", Comparison::LessOrEqual),
            (">=", Comparison::GreaterOrEqual),
            ("==", Comparison::Equal),
            ("!=", Comparison::NotEqual),
            ("<", Comparison::Less),
            (">", Comparison::Greater),
        ];
        self.skip_spaces();
        for (sign, comparison) in SIGNS {
            if self.rest().starts_with(sign) {
                self.at += sign.len();
                return Ok(comparison);
            }
        }
        Err(self.error("expected <, <=, ==, !=, >= or >"))
    }

    fn expect(&mut self, wanted: char) -> Result<(), ThresholdError> {
        if self.peek() != Some(wanted) {
            return Err(self.error(format!("expected `{wanted}`")));
        }
        self.at += wanted.len_utf8();
        Ok(())
    }

    fn word(&mut self, belongs: impl Fn(char) -> bool) -> String {
        let word: String = self.rest().chars().take_while(|c| belongs(*c)).collect();
        self.at += word.len();
        word
    }

    fn peek(&mut self) -> Option<char> {
        self.skip_spaces();
        self.rest().chars().next()
    }

    fn skip_spaces(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn error(&self, problem: impl Into<String>) -> ThresholdError {
        let at = self.text.get(..self.at).unwrap_or_default().chars().count() + 1;
        ThresholdError {
            text: self.text.to_owned(),
            at,
            problem: problem.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparisons_of_sums_are_judged() {
        for (text, passed) in [
            ("t99_seconds <= 1.1 * optimum_seconds", true),
            ("t99_seconds / optimum_seconds > 1.05", false),
            ("seawall.calm.healthy.p99_ms * 2 >= max(3, lost_sessions, 1 + 1)", true),
            ("(1 + 2) * 3 == 9", true),
            ("1 + 2 * 3 != 7", false),
            ("10 - 4 - 3 == 3", true),
            ("lost_sessions==0", true),
            ("lost_sessions < 0", false),
            ("min(4,5)<4.5", true),
        ] {
            assert_eq!(
                Threshold::parse(text).unwrap().judge(&figures()).passed,
                passed,
                "{text}"
            );
        }
    }

    #[test]
    fn a_figure_that_was_not_reached_fails_every_comparison() {
        for text in [
            "t100_seconds <= 1",
            "t100_seconds > 1",
            "t100_seconds != 1",
            "1 / lost_sessions > 0",
            "absent == 0",
        ] {
            let outcome = Threshold::parse(text).unwrap().judge(&figures());

            assert!(!outcome.passed, "{text}");
            assert_eq!(outcome.left, None);
        }
    }

    #[test]
    fn a_threshold_says_where_it_is_wrong() {
        for (text, expected) in [
            ("", "expected a number, a figure or a bracket at character 1"),
            ("a <= ", "expected a number, a figure or a bracket at character 6"),
            ("a = 3", "expected <, <=, ==, !=, >= or > at character 3"),
            ("a <= 3 <= 4", "something behind the comparison at character 8"),
            ("(a <= 3", "expected `)` at character 4"),
            ("sum(a) <= 3", "no function `sum`"),
            ("1.2.3 < 4", "`1.2.3` is not a number"),
            ("é < 3", "expected a number, a figure or a bracket at character 1"),
        ] {
            let error = Threshold::parse(text).unwrap_err().to_string();

            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(Threshold::parse(&"(".repeat(100_000)).is_err());
    }

    #[test]
    fn a_threshold_names_its_figures() {
        let threshold = Threshold::parse("a.b + max(c, 2) < d").unwrap();

        assert_eq!(threshold.figures(), ["a.b", "c", "d"]);
    }

    fn figures() -> Figures {
        [
            ("t99_seconds", Some(10.4)),
            ("t100_seconds", None),
            ("optimum_seconds", Some(10.0)),
            ("lost_sessions", Some(0.0)),
            ("seawall.calm.healthy.p99_ms", Some(2.5)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}
