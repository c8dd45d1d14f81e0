//! Frames of `seawall.v1`: JSON text, one object per frame, unknown fields ignored (docs/PROTOCOL.md).
//!
//! [`ServerFrame`] is sent by the gateway, [`DeviceFrame`] by a device. Each type both writes and reads its frames, so
//! that the two sides cannot diverge. Payloads pass through unparsed.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::id::RuleId;

/// Maximum length of a message id, in bytes. A longer one is a bad frame.
pub const MESSAGE_ID_LEN_MAX: usize = 128;

/// Maximum length of a topic, in bytes. A longer one is a bad frame.
pub const TOPIC_LEN_MAX: usize = 256;

/// A frame from the gateway.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerFrame<'a> {
    /// The first frame of every session.
    Welcome {
        /// Identifies the session in logs and in the API.
        session: Cow<'a, str>,
        /// Interval of the gateway's pings, and of the heartbeats of a device that cannot answer pings.
        heartbeat_ms: u64,
        /// Maximum wait between attempts of a device that gets no hint.
        backoff_cap_ms: u64,
        /// A resume token, if this gateway issues them.
        #[serde(skip_serializing_if = "Option::is_none")]
        resume: Option<Cow<'a, str>>,
        /// RFC 3339, in UTC.
        server_time: Cow<'a, str>,
    },
    /// A renewed resume token.
    Resume { token: Cow<'a, str> },
    /// From a backend or an operator; the device answers with an ack.
    Message { id: Cow<'a, str>, payload: &'a RawValue },
    /// The device's message is in the node's event buffer.
    Ack { id: Cow<'a, str> },
    /// Close 1012 follows at once.
    Reconnect {
        after_ms: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        slot: Option<Cow<'a, str>>,
        reason: Cow<'a, str>,
    },
    /// In a restricted session; close 4000 follows.
    Update { rule: RuleId, update: &'a RawValue },
    /// A frame was not understood, or came too soon. Describes the problem without repeating the frame.
    Error { code: ErrorCode, detail: Cow<'a, str> },
}

/// Why a device's frame was rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    BadFrame,
    RateLimited,
}

impl<'a> ServerFrame<'a> {
    /// Parses a text frame, for the reference device. `None` if this version does not know it.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        let fields: ServerFields<'a> = serde_json::from_str(text).ok()?;
        let text = |field: Option<Text<'a>>| field.map(|Text(text)| text);
        Some(match fields.kind.0.as_ref() {
            "welcome" => Self::Welcome {
                session: text(fields.session)?,
                heartbeat_ms: fields.heartbeat_ms?,
                backoff_cap_ms: fields.backoff_cap_ms?,
                resume: text(fields.resume),
                server_time: text(fields.server_time)?,
            },
            "resume" => Self::Resume {
                token: text(fields.token)?,
            },
            "message" => Self::Message {
                id: text(fields.id)?,
                payload: fields.payload?,
            },
            "ack" => Self::Ack { id: text(fields.id)? },
            "reconnect" => Self::Reconnect {
                after_ms: fields.after_ms?,
                slot: text(fields.slot),
                reason: text(fields.reason)?,
            },
            "update" => Self::Update {
                rule: fields.rule?,
                update: fields.update?,
            },
            "error" => Self::Error {
                code: fields.code?,
                detail: text(fields.detail)?,
            },
            _ => return None,
        })
    }

    /// Encodes the frame.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("texts, numbers and raw JSON always have a JSON form")
    }
}

/// A frame from a device.
#[derive(Clone, Debug)]
pub enum DeviceFrame<'a> {
    /// Only shows that the device is alive.
    Heartbeat,
    /// Answered with an ack once it is in the event buffer.
    Message {
        id: Cow<'a, str>,
        topic: Option<Cow<'a, str>>,
        payload: Option<&'a RawValue>,
    },
    /// The device has received a message of the gateway.
    Ack { id: Cow<'a, str> },
}

impl<'a> DeviceFrame<'a> {
    /// Parses a text frame.
    ///
    /// # Errors
    /// The text is not a JSON object or has no known type, or a field is missing, over its limit or of the wrong kind.
    pub fn parse(text: &'a str) -> Result<Self, BadFrame> {
        let fields: Fields<'a> = serde_json::from_str(text).map_err(|_| BadFrame::classify(text))?;
        match fields.kind.0.as_ref() {
            "heartbeat" => Ok(Self::Heartbeat),
            "message" => Ok(Self::Message {
                id: message_id(fields.id)?,
                topic: topic(fields.topic)?,
                payload: fields.payload,
            }),
            "ack" => Ok(Self::Ack {
                id: message_id(fields.id)?,
            }),
            _ => Err(BadFrame::UnknownType),
        }
    }

    /// Encodes the frame, for the reference device.
    #[must_use]
    pub fn to_json(&self) -> String {
        let fields = match self {
            Self::Heartbeat => Written::of("heartbeat"),
            Self::Message { id, topic, payload } => Written {
                id: Some(id),
                topic: topic.as_deref(),
                payload: *payload,
                ..Written::of("message")
            },
            Self::Ack { id } => Written {
                id: Some(id),
                ..Written::of("ack")
            },
        };
        serde_json::to_string(&fields).expect("texts and raw JSON always have a JSON form")
    }
}

fn message_id(id: Option<Text<'_>>) -> Result<Cow<'_, str>, BadFrame> {
    match id {
        Some(Text(id)) if (1..=MESSAGE_ID_LEN_MAX).contains(&id.len()) => Ok(id),
        Some(_) => Err(BadFrame::BadId),
        None => Err(BadFrame::MissingId),
    }
}

fn topic(topic: Option<Text<'_>>) -> Result<Option<Cow<'_, str>>, BadFrame> {
    match topic {
        Some(Text(topic)) if topic.len() > TOPIC_LEN_MAX => Err(BadFrame::BadTopic),
        topic => Ok(topic.map(|Text(topic)| topic)),
    }
}

/// Why a device's frame is bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    #[error("a frame is a JSON object")]
    NoObject,
    #[error("type, id or topic is missing, doubled or no text")]
    BadFields,
    #[error("this type is not known")]
    UnknownType,
    #[error("the id is missing")]
    MissingId,
    #[error("the id is empty or longer than 128 bytes")]
    BadId,
    #[error("the topic is longer than 256 bytes")]
    BadTopic,
}

impl BadFrame {
    fn classify(text: &str) -> Self {
        let is_object =
            text.trim_start().starts_with('{') && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok();
        if is_object { Self::BadFields } else { Self::NoObject }
    }
}

/// Text that is borrowed from the frame if it has no escapes. (`Option<Cow<str>>` alone would always be copied.)
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(rename = "type", borrow)]
    kind: Text<'a>,
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    topic: Option<Text<'a>>,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ServerFields<'a> {
    #[serde(rename = "type", borrow)]
    kind: Text<'a>,
    #[serde(borrow)]
    session: Option<Text<'a>>,
    heartbeat_ms: Option<u64>,
    backoff_cap_ms: Option<u64>,
    #[serde(borrow)]
    resume: Option<Text<'a>>,
    #[serde(borrow)]
    server_time: Option<Text<'a>>,
    #[serde(borrow)]
    token: Option<Text<'a>>,
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    after_ms: Option<u64>,
    #[serde(borrow)]
    slot: Option<Text<'a>>,
    #[serde(borrow)]
    reason: Option<Text<'a>>,
    rule: Option<RuleId>,
    #[serde(borrow)]
    update: Option<&'a RawValue>,
    code: Option<ErrorCode>,
    #[serde(borrow)]
    detail: Option<Text<'a>>,
}

#[derive(Serialize)]
struct Written<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    topic: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a RawValue>,
}

impl Written<'_> {
    const fn of(kind: &'static str) -> Self {
        Self {
            kind,
            id: None,
            topic: None,
            payload: None,
        }
    }
}

#[cfg(test)]
mod tests;
