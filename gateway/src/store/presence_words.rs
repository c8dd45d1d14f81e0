//! Presence in words: as the database, events and the API have it.

use seawall_proto::{
    close::EndReason,
    presence::{Cause, Evidence, Presence},
    time::WallTime,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Words of transitions that are neither the end of a session nor a cause.
const OTHER_WORDS: [&str; 4] = ["connected", "heard", "not_back", "other"];
const FIRST_OTHER: u8 = EndReason::ALL.len() as u8;
const FIRST_CAUSE: u8 = FIRST_OTHER + OTHER_WORDS.len() as u8;

/// Reason of a transition, in one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason(u8);

impl Reason {
    /// A device connected.
    pub const CONNECTED: Self = Self(FIRST_OTHER);
    /// A device was heard again in the same session.
    pub const HEARD: Self = Self(FIRST_OTHER + 1);
    /// A device did not return after a restart of its node.
    pub const NOT_BACK: Self = Self(FIRST_OTHER + 2);
    /// Of a device without a transition, or a word of a later version.
    pub const OTHER: Self = Self(FIRST_OTHER + 3);

    /// The reason that is written so.
    #[must_use]
    pub fn of(word: &str) -> Self {
        let found = words().position(|known| known == word);
        found
            .and_then(|index| u8::try_from(index).ok())
            .map_or(Self::OTHER, Self)
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        words().nth(usize::from(self.0)).unwrap_or("other")
    }

    /// Why the session ended, if that is the reason.
    #[must_use]
    pub fn end(self) -> Option<EndReason> {
        EndReason::ALL.get(usize::from(self.0)).copied()
    }
}

/// A session ended, or a newer one took over.
impl From<EndReason> for Reason {
    fn from(end: EndReason) -> Self {
        Self(end as u8)
    }
}

impl From<Cause> for Reason {
    fn from(cause: Cause) -> Self {
        Self(FIRST_CAUSE + cause as u8)
    }
}

fn words() -> impl Iterator<Item = &'static str> {
    let ends = EndReason::ALL.into_iter().map(EndReason::as_str);
    let causes = Cause::ALL.into_iter().map(Cause::as_str);
    ends.chain(OTHER_WORDS).chain(causes)
}

/// Whether a device is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PresenceState {
    Online,
    Offline,
    Unknown,
}

impl PresenceState {
    pub const ALL: [Self; 3] = [Self::Online, Self::Offline, Self::Unknown];

    #[must_use]
    pub const fn of(presence: Presence) -> Self {
        match presence {
            Presence::Online => Self::Online,
            Presence::Offline(_) => Self::Offline,
            Presence::Unknown(_) => Self::Unknown,
        }
    }

    /// As the API writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Offline => "offline",
            Self::Unknown => "unknown",
        }
    }
}

/// What proves that a device is offline. Times are RFC 3339.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EvidenceText {
    /// A close frame ended its session.
    Closed {
        /// The code of the close frame; 1005 if it had none.
        code: u16,
        /// Whether the device sent it first.
        by_device: bool,
    },
    /// Its connection was reset, or ended without a close frame.
    Reset,
    /// It left pings unanswered, and the kernel held nothing unread of it.
    Silent {
        pings_unanswered: u8,
        /// When its last byte came in.
        last_heard: String,
    },
    /// The process that held its socket ended, and it did not return in time.
    NotBack {
        /// Since when it could have returned.
        since: String,
    },
}

impl EvidenceText {
    /// `None` for a device that is not offline.
    #[must_use]
    pub fn of(presence: Presence) -> Option<Self> {
        let Presence::Offline(evidence) = presence else {
            return None;
        };
        Some(match evidence {
            Evidence::Closed { code, by_device } => Self::Closed { code, by_device },
            Evidence::Reset => Self::Reset,
            Evidence::Silent {
                pings_unanswered,
                last_heard,
            } => Self::Silent {
                pings_unanswered,
                last_heard: last_heard.to_rfc3339(),
            },
            Evidence::NotBack { since } => Self::NotBack {
                since: since.to_rfc3339(),
            },
        })
    }

    /// The evidence that was written so. `None` if a time is not one.
    #[must_use]
    pub fn evidence(&self) -> Option<Evidence> {
        Some(match self {
            Self::Closed { code, by_device } => Evidence::Closed {
                code: *code,
                by_device: *by_device,
            },
            Self::Reset => Evidence::Reset,
            Self::Silent {
                pings_unanswered,
                last_heard,
            } => Evidence::Silent {
                pings_unanswered: *pings_unanswered,
                last_heard: parse_time(last_heard)?,
            },
            Self::NotBack { since } => Evidence::NotBack {
                since: parse_time(since)?,
            },
        })
    }
}

/// The cause of a state that is not known.
#[must_use]
pub const fn cause_of(presence: Presence) -> Option<&'static str> {
    match presence {
        Presence::Unknown(cause) => Some(cause.as_str()),
        Presence::Online | Presence::Offline(_) => None,
    }
}

fn parse_time(text: &str) -> Option<WallTime> {
    let time = humantime::parse_rfc3339(text).ok()?;
    let since = time.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(WallTime::from_unix_ms(u64::try_from(since.as_millis()).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_kept_as_it_is() {
        for word in words() {
            assert_eq!(Reason::of(word).as_str(), word);
        }
        assert_eq!(Reason::of("of a later version"), Reason::OTHER);
        for end in EndReason::ALL {
            assert_eq!(
                (Reason::from(end).as_str(), Reason::from(end).end()),
                (end.as_str(), Some(end))
            );
        }
        for cause in Cause::ALL {
            assert_eq!(
                (Reason::from(cause).as_str(), Reason::from(cause).end()),
                (cause.as_str(), None)
            );
        }
        let others = [Reason::CONNECTED, Reason::HEARD, Reason::NOT_BACK, Reason::OTHER];
        assert_eq!(others.map(Reason::as_str), OTHER_WORDS);
    }

    #[test]
    fn evidence_is_read_as_it_was_written() {
        let at = WallTime::from_unix_ms(1_796_000_000_123);
        for evidence in [
            Evidence::Closed {
                code: 4001,
                by_device: true,
            },
            Evidence::Reset,
            Evidence::Silent {
                pings_unanswered: 3,
                last_heard: at,
            },
            Evidence::NotBack { since: at },
        ] {
            let text = EvidenceText::of(Presence::Offline(evidence)).unwrap();
            let json = serde_json::to_string(&text).unwrap();

            let read: EvidenceText = serde_json::from_str(&json).unwrap();
            assert_eq!(read.evidence(), Some(evidence), "{json}");
        }
        assert_eq!(EvidenceText::of(Presence::Online), None);
    }
}
