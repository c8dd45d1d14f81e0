//! A refusal (docs/PROTOCOL.md, "Being refused"), as a device reads it.

use std::{fmt, time::Duration};

use seawall_proto::refusal::{Code, Hint};
use serde::Deserialize;

use super::answer::Answer;

/// A refusal, as it came over the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    pub status: u16,
    /// `code` of the problem document. `None` where the body is none.
    pub code: Option<String>,
    pub detail: Option<String>,
    /// Id of the rule that refused.
    pub rule: Option<String>,
    /// `Seawall-Retry-After-Ms`, else `Retry-After` in whole seconds.
    pub retry_after_ms: Option<u64>,
    pub slot: Option<String>,
    /// All headers, names in lower case, in the order of arrival for each name.
    pub headers: Vec<(String, String)>,
    /// Its first 8 KiB.
    pub body: String,
}

impl Refused {
    pub(super) fn read(answer: Answer, body: &[u8]) -> Self {
        let body = String::from_utf8_lossy(body).into_owned();
        let problem: Problem = serde_json::from_str(&body).unwrap_or_default();
        let refused = Self {
            status: answer.status,
            code: problem.code,
            detail: problem.detail,
            rule: problem.rule,
            headers: answer.headers,
            body,
            ..Self::default()
        };
        let number = |name| refused.header(name).and_then(|text| text.trim().parse::<u64>().ok());
        Self {
            retry_after_ms: number("seawall-retry-after-ms")
                .or_else(|| number("retry-after").map(|seconds| seconds.saturating_mul(1000))),
            slot: refused.header("seawall-slot").map(str::to_owned),
            ..refused
        }
    }

    /// The first header of this name (lower case).
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(of, _)| of == name)
            .map(|(_, value)| value.as_str())
    }

    /// The code, if docs/PROTOCOL.md lists it under "Being refused".
    #[must_use]
    pub fn known_code(&self) -> Option<Code> {
        let code = self.code.as_deref()?;
        Code::ALL.into_iter().find(|known| known.as_str() == code)
    }

    /// What the device machine obeys.
    #[must_use]
    pub fn hint(&self) -> Option<Hint> {
        self.retry_after_ms.map(|ms| Hint {
            after: Duration::from_millis(ms),
            slot: self.slot.as_deref().map(Box::from),
        })
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "refused with {} {}",
            self.status,
            self.code.as_deref().unwrap_or("without a code")
        )?;
        match self.retry_after_ms {
            Some(ms) => write!(f, ", retry in {ms} ms"),
            None => Ok(()),
        }
    }
}

#[derive(Default, Deserialize)]
struct Problem {
    code: Option<String>,
    detail: Option<String>,
    rule: Option<String>,
}
