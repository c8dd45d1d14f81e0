//! Firmware rules: which devices an operator refuses, and the set of rules as a node asks it.
//!
//! This module decides what rules say of a device. It does not store them, close sessions or write answers. Read [`RuleSet`] first.

mod compiled;
mod preview;
mod spec;
mod stored;
mod text;

pub use compiled::{OwnedSubject, RuleSet, Subject};
pub use preview::{Beside, Preview, Seen, VersionHit};
pub use spec::{Effect, Match, Mode, Rule, RuleSpec, SpecError};
pub use stored::Unsupported;

#[cfg(test)]
mod tests;
