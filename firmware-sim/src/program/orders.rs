//! Orders on standard input, one per line, from the program that started this one.

use std::{
    fmt,
    io::{BufRead, IsTerminal},
    str::FromStr,
    thread,
};

use anyhow::{Error, anyhow};
use firmware_sim::mix::Share;
use tokio::sync::mpsc;

/// Orders read and not yet obeyed; then the reader waits.
const ORDERS_WAITING_MAX: usize = 16;

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// `drop`.
    Drop,
    /// `stop`.
    Stop,
    /// `firmware VERSION=SHARE`.
    Firmware { version: String, share: Share },
    /// Anything else. Told to the user, and then forgotten.
    Unknown(String),
}

impl FromStr for Order {
    type Err = std::convert::Infallible;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let line = line.trim();
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let order = match (verb, rest.trim()) {
            ("drop", "") => Some(Self::Drop),
            ("stop", "") => Some(Self::Stop),
            ("firmware", rest) => rest.rsplit_once('=').and_then(|(version, share)| {
                Some(Self::Firmware {
                    version: version.trim().into(),
                    share: share.parse().ok()?,
                })
            }),
            _ => None,
        };
        Ok(order.unwrap_or_else(|| Self::Unknown(line.into())))
    }
}

/// As it is read.
impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drop => f.write_str("drop"),
            Self::Stop => f.write_str("stop"),
            Self::Firmware { version, share } => match share {
                Share::Percent(percent) => write!(f, "firmware {version}={percent}%"),
                Share::Count(count) => write!(f, "firmware {version}={count}"),
            },
            Self::Unknown(line) => f.write_str(line),
        }
    }
}

pub fn unknown(line: &str) -> Error {
    anyhow!("{line:?} is not an order: expected `drop`, `stop` or `firmware VERSION=SHARE`")
}

/// `None` where standard input is a terminal: a shell stops a background job that reads from one.
///
/// Reads in a thread of its own, which lives as long as the program: nothing can interrupt its read.
pub fn orders() -> Option<mpsc::Receiver<Order>> {
    if std::io::stdin().is_terminal() {
        return None;
    }
    let (tx, rx) = mpsc::channel(ORDERS_WAITING_MAX);
    let read = move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if line.trim().is_empty() {
                continue;
            }
            let Ok(order) = line.parse();
            if tx.blocking_send(order).is_err() {
                break;
            }
        }
    };
    thread::Builder::new().name("orders".into()).spawn(read).ok()?;
    Some(rx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_survive_being_passed_on() {
        for line in [
            "drop",
            "stop",
            "firmware 3.8.0-b3=25%",
            "firmware a=b=3",
            "firmware x=12.5%",
        ] {
            let order: Order = line.parse().unwrap();

            assert!(!matches!(order, Order::Unknown(_)), "{line}");
            assert_eq!(order.to_string(), line);
        }
    }

    #[test]
    fn other_lines_are_unknown() {
        for line in ["drop all", "firmware", "firmware a", "firmware a=x", "halt"] {
            let order: Order = line.parse().unwrap();

            assert_eq!(order, Order::Unknown(line.into()));
        }
    }
}
