//! Stored rules, which any version may have written.
//!
//! The API refuses rules that this version cannot enforce. Stored ones are not refused: during a rolling upgrade a
//! later version writes rules that an earlier one reads. Such a rule is kept as written, and enforced only by versions
//! that know all of it.

use super::{Rule, RuleSpec};
use crate::{id::RuleId, time::WallTime};

/// Maximum length of [`Unsupported::problem`], in characters.
const PROBLEM_LEN_MAX: usize = 200;

/// A stored rule that this version cannot enforce. It refuses no device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    pub id: RuleId,
    /// The stored rule, byte by byte: JSON, unless it was not written by a gateway.
    pub spec: Box<str>,
    pub created_at: WallTime,
    /// Revision of the rule set at which this rule was last changed.
    pub revision: u64,
    /// Why this version cannot enforce it. It has no control characters.
    pub problem: String,
}

impl Rule {
    /// Reads a stored rule.
    ///
    /// # Errors
    /// This version cannot enforce it: its effect, mode, share, a field or its form is not known.
    pub fn read(id: RuleId, spec: &str, created_at: WallTime, revision: u64) -> Result<Self, Unsupported> {
        let read = serde_json::from_str::<RuleSpec>(spec).map_err(|error| error.to_string());
        let checked = read.and_then(|read| match read.validate() {
            Ok(()) => Ok(read),
            Err(error) => Err(format!("{}: {error}", error.field())),
        });
        match checked {
            Ok(spec) => Ok(Self {
                id,
                spec,
                created_at,
                revision,
            }),
            Err(problem) => Err(Unsupported {
                id,
                spec: spec.into(),
                created_at,
                revision,
                problem: printable(&problem),
            }),
        }
    }

    /// The rule as [`Rule::read`] reads it.
    ///
    /// # Panics
    /// Never: a spec has text keys and no failing fields.
    #[must_use]
    pub fn spec_json(&self) -> String {
        serde_json::to_string(&self.spec).expect("a spec has text keys and no failing fields")
    }
}

fn printable(problem: &str) -> String {
    let shown = problem.chars().map(|c| if c.is_control() { ' ' } else { c });
    shown.take(PROBLEM_LEN_MAX).collect()
}
