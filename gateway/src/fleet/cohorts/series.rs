//! How cohorts are written in the exposition format.

use std::fmt::Write as _;

use data_encoding::HEXLOWER;
use sha2::{Digest as _, Sha256};

/// Longest value of the label `cohort`, in bytes.
const LABEL_LEN_MAX: usize = 64;
/// What a cut label ends with: a tilde and eight digits.
const LABEL_HASH_LEN: usize = 9;

pub(super) fn line(text: &mut String, metric: &str, cohort: &str, outcome: Option<&str>, figure: u64) {
    let written = match outcome {
        None => writeln!(text, "{metric}{{cohort=\"{cohort}\"}} {figure}"),
        Some(outcome) => writeln!(text, "{metric}{{cohort=\"{cohort}\",outcome=\"{outcome}\"}} {figure}"),
    };
    debug_assert!(written.is_ok(), "writing to a string does not fail");
}

/// Escaped for the exposition format, and at most 64 bytes: a longer one is cut between characters and escapes, and ends with a part
/// of its hash, so that no two are alike.
pub(super) fn label(name: &str) -> String {
    let mut escaped = String::new();
    let mut cut = 0;
    for character in name.chars() {
        match character {
            '\\' => escaped.push_str("\\\\"),
            '"' => escaped.push_str("\\\""),
            '\n' => escaped.push_str("\\n"),
            other => escaped.push(other),
        }
        if escaped.len() <= LABEL_LEN_MAX - LABEL_HASH_LEN {
            cut = escaped.len();
        }
    }
    if escaped.len() > LABEL_LEN_MAX {
        escaped.truncate(cut);
        let digest = Sha256::digest(name.as_bytes());
        escaped.push('~');
        escaped += &HEXLOWER.encode(&digest[..LABEL_HASH_LEN / 2]);
    }
    escaped
}
