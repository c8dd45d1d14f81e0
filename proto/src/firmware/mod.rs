//! Firmware versions as fleets write them: their order, and ranges over it.
//!
//! This module orders version texts and tells which of them a range contains. It does not know rules, devices or
//! refusals (see [`crate::rules`]). Read [`Version`] first.

mod range;
mod token;
mod version;

pub(crate) use range::{Cut, Exact, Span};
pub use range::{MISSING, Problem, Range, RangeError};
pub use version::{Version, compare};

#[cfg(test)]
mod order_tests;
#[cfg(test)]
mod range_tests;
