//! What the device sends: frames of `seawall.v1`, or opaque messages of a plain session.

use crate::{
    close::Close,
    frame::{BadFrame, DeviceFrame, ErrorCode, ServerFrame},
    hello::SessionKind,
    session::{Action, BadFrames, Moment, Payload, Received, Session},
};

/// Fragments that count as one message. 64 KiB in pieces of 64 bytes are one message and no more.
const FRAGMENTS_PER_MESSAGE: u32 = 1_024;

impl Session {
    /// A message came in this many fragments. Each of them costs time, however short it is: so many short ones count as
    /// messages of their own. To be called before the message itself is handled.
    pub fn handle_fragments(&mut self, fragments: u32, now: Moment) {
        for _ in 0..fragments.saturating_sub(1) / FRAGMENTS_PER_MESSAGE {
            if !self.heard(now) {
                return;
            }
        }
    }

    /// A text frame came in, already checked to be UTF-8.
    pub fn handle_text(&mut self, text: &str, now: Moment) {
        if self.is_closing {
            return;
        }
        match self.kind {
            SessionKind::V1 => {
                let frame = DeviceFrame::parse(text);
                if self.acks_expected > 0 && matches!(frame, Ok(DeviceFrame::Ack { .. })) {
                    // The device did not choose how many messages an operator sends it.
                    self.acks_expected -= 1;
                    self.note_heard(now.observed);
                } else if !self.heard(now) {
                    return;
                }
                match frame {
                    Ok(frame) => self.handle_frame(frame),
                    Err(bad) => self.handle_bad_frame(bad, now),
                }
            }
            SessionKind::Plain => {
                if self.heard(now) {
                    self.receive_opaque(Payload::Text(text.into()));
                }
            }
        }
    }

    /// A binary frame came in. `seawall.v1` has none.
    pub fn handle_binary(&mut self, bytes: &[u8], now: Moment) {
        if !self.heard(now) {
            return;
        }
        match self.kind {
            SessionKind::V1 => self.handle_close(Close::WrongKind),
            SessionKind::Plain => self.receive_opaque(Payload::Binary(bytes.into())),
        }
    }

    /// Notes that the device lives. False where nothing more is to be done with the frame: the session is ending, or now
    /// ends because the device sends too fast.
    pub(super) fn heard(&mut self, now: Moment) -> bool {
        if self.is_closing {
            return false;
        }
        self.note_heard(now.observed);
        if self.rate.take(&self.limits, now.real) {
            return true;
        }
        self.actions.push_back(Action::Complained(ErrorCode::RateLimited));
        if self.kind == SessionKind::V1 {
            self.say(&ServerFrame::Error {
                code: ErrorCode::RateLimited,
                detail: "more frames than this session may send".into(),
            });
        }
        self.handle_close(Close::Policy);
        false
    }

    fn handle_frame(&mut self, frame: DeviceFrame<'_>) {
        match frame {
            DeviceFrame::Heartbeat => {}
            DeviceFrame::Message { id, topic, payload } => self.actions.push_back(Action::Received(Received {
                id: Some(id.into()),
                topic: topic.map(Box::from),
                payload: Payload::Json(payload.map_or("null", |payload| payload.get()).into()),
            })),
            DeviceFrame::Ack { id } => self.actions.push_back(Action::Acked(id.into())),
        }
    }

    fn handle_bad_frame(&mut self, bad: BadFrame, now: Moment) {
        self.actions.push_back(Action::Complained(ErrorCode::BadFrame));
        let bad_frames = self.bad_frames.get_or_insert_with(Box::<BadFrames>::default);
        if bad_frames.is_too_many(now.real) {
            self.handle_close(Close::Policy);
        } else {
            self.say(&ServerFrame::Error {
                code: ErrorCode::BadFrame,
                detail: bad.to_string().into(),
            });
        }
    }

    fn receive_opaque(&mut self, payload: Payload) {
        self.actions.push_back(Action::Received(Received {
            id: None,
            topic: None,
            payload,
        }));
    }
}
