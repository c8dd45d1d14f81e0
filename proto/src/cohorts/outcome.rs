//! Outcomes of connect attempts.

use crate::refusal::Code;

/// What became of a connect attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Admitted,
    /// The peer left before the answer.
    Abandoned,
    /// It has a restricted session.
    Restricted,
    Refused(Code),
}

/// Outcomes other than refusals.
const UNREFUSED: [Outcome; 3] = [Outcome::Admitted, Outcome::Abandoned, Outcome::Restricted];

impl Outcome {
    /// Number of outcomes, with the codes of refusals.
    pub const COUNT: usize = UNREFUSED.len() + Code::ALL.len();

    /// Label `outcome` of `seawall_handshakes_total`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admitted => "admitted",
            Self::Abandoned => "abandoned",
            Self::Restricted => "restricted",
            Self::Refused(code) => code.as_str(),
        }
    }

    /// Its place among all outcomes: below [`Outcome::COUNT`].
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Admitted => 0,
            Self::Abandoned => 1,
            Self::Restricted => 2,
            Self::Refused(code) => UNREFUSED.len() + Code::ALL.iter().position(|other| *other == code).unwrap_or(0),
        }
    }

    /// The outcome of this [`index`](Self::index).
    #[must_use]
    pub fn of_index(index: usize) -> Self {
        match UNREFUSED.get(index) {
            Some(outcome) => *outcome,
            None => Self::Refused(Code::ALL[(index - UNREFUSED.len()).min(Code::ALL.len() - 1)]),
        }
    }

    /// Every outcome, in the order of [`index`](Self::index).
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT).map(Self::of_index)
    }
}
