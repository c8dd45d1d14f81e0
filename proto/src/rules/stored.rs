//! Stored rules, which any version may have written.
//!
//! The API refuses what this version can't enforce. What is stored is not refused: during a rolling upgrade a later version writes
//! rules that an earlier one reads. Such a rule is kept as it was written, and enforced by nobody who does not know all of it.

use std::collections::BTreeMap;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{Rule, RuleSpec};
use crate::{id::RuleId, time::WallTime};

/// Number of the form in which a rule is hashed. Another form has another number.
const FORM: u8 = 1;
/// Maximum length of [`Unsupported::problem`], in characters.
const PROBLEM_LEN_MAX: usize = 200;

/// A stored rule that this version can't enforce. It refuses nobody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    pub id: RuleId,
    /// The rule as it is stored, byte by byte: JSON, unless somebody else than a gateway wrote it.
    pub spec: Box<str>,
    pub created_at: WallTime,
    /// Revision of the rule set at which this rule was last changed.
    pub revision: u64,
    /// Why this version can't enforce it. No control characters.
    pub problem: String,
}

impl Rule {
    /// Reads a stored rule.
    ///
    /// # Errors
    /// This version can't enforce it: its effect, mode, share, a field or its form is not known.
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

/// Hashes of what is stored under an id, equal in all versions of the gateway that read the same rules.
///
/// A version hashes a rule that it does not know in full as it is stored, and one that it knows without the fields that say what
/// their absence says. A later version's new field changes the digest of those rules only that use it, on all nodes alike.
pub(super) fn hash_rule(hash: &mut Sha256, id: RuleId, created_at: WallTime, revision: u64, spec: &str) {
    let content = canonical(spec);
    hash.update([FORM]);
    hash.update(id.0.as_bytes());
    hash.update(created_at.as_unix_ms().to_be_bytes());
    hash.update(revision.to_be_bytes());
    hash.update((content.len() as u64).to_be_bytes());
    hash.update(&content);
}

/// JSON with sorted keys, without fields that have their default; text that is not a JSON object as it is.
fn canonical(spec: &str) -> String {
    let Ok(mut fields) = serde_json::from_str::<BTreeMap<String, Value>>(spec) else {
        return spec.to_owned();
    };
    fields.retain(|name, value| !is_default(name, value));
    serde_json::to_string(&fields).unwrap_or_else(|_| spec.to_owned())
}

fn is_default(name: &str, value: &Value) -> bool {
    match name {
        "admit_percent" => value == 0,
        "mode" => value == "enforce",
        "reason" => value == "",
        "retry_after" => value == "15m",
        "expires_at" => value.is_null(),
        "evict" => value == false,
        _ => false,
    }
}
