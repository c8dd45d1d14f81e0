//! Firmware rules: which devices an operator refuses, and the set of rules that a node evaluates.
//!
//! This module decides what happens to a device. It does not store rules, close sessions or write answers. Read
//! [`RuleSet`] first.

mod compiled;
mod digest;
mod journal;
mod merge;
mod preview;
mod shares;
mod spec;
mod stored;
mod subject;
pub(crate) mod text;
mod verdict;

pub use compiled::RuleSet;
pub use journal::{LocalWrite, Settlement, Stored, chains, net, overlay};
pub use merge::{InForce, Lost, Returned, StoredRules, merge};
pub use preview::{Beside, Preview, Seen, VersionHit};
pub use spec::{Effect, Match, Mode, Rule, RuleSpec, SpecError};
pub use stored::Unsupported;
pub use subject::{OwnedSubject, Subject};
pub use verdict::{Ruling, Verdict};

#[cfg(test)]
mod tests;
