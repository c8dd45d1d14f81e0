//! An open session: frames and time to the machine, the machine's actions to the socket.

use std::{borrow::Cow, time::Duration};

use futures_util::{SinkExt, StreamExt};
use seawall_proto::frame::DeviceFrame;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::tungstenite::{self, Message, protocol, protocol::frame::coding::CloseCode};

use super::{Event, GOODBYE_MAX, SEND_MAX, commands::Absence, task::DeviceTask};
use crate::{
    connection::reset,
    device::{Action, CloseFrame, State},
    handshake::Socket,
    messages::Messages,
    profile::Profile,
};

/// Time in which a slow reader takes one message.
const SLOW_READ_PAUSE: Duration = Duration::from_secs(1);

/// Maximum time until a session without a timer wakes up.
const IDLE_MAX: Duration = Duration::from_secs(3600);

/// A close frame without a code counts as this. RFC 6455 §7.4.1.
const CODE_NONE: u16 = 1005;

/// Work left for the socket once the machine has left the session.
enum Ending {
    /// A close frame came, and its answer goes out.
    Answer { code: u16 },
    /// Close 1000: an order to leave.
    Goodbye,
    /// Reset: the device has lost its power, as its profile does or by an order.
    Left,
    /// Reset: the gateway has been silent, or takes nothing.
    GivenUp,
    /// The socket is gone already.
    Lost,
}

impl DeviceTask {
    pub(super) async fn session(&mut self, mut socket: Box<Socket>) {
        let ending = self.converse(&mut socket).await;
        let by_device = matches!(ending, None | Some(Ending::Goodbye | Ending::Left));
        let code = match ending {
            None | Some(Ending::Goodbye) => {
                say_goodbye(&mut socket).await;
                None
            }
            Some(Ending::Answer { code }) => {
                // The gateway closes first (RFC 6455 §7.1.1): the port that lingers is then its one, not one of ours.
                let _ = timeout(GOODBYE_MAX, drain(&mut socket)).await;
                Some(code)
            }
            Some(Ending::Left | Ending::GivenUp) => {
                reset(*socket);
                None
            }
            Some(Ending::Lost) => None,
        };
        self.report(Event::Closed { code, by_device });
        if let State::Stopped { code } = self.device.state() {
            self.report(Event::Stopped { code });
        }
    }

    /// Until the machine is no longer online; `None` where the driver ends.
    async fn converse(&mut self, socket: &mut Socket) -> Option<Ending> {
        let is_silent = self.device.profile().is_silent();
        let mut messages = self
            .messages_every
            .filter(|_| !is_silent)
            .map(|every| Messages::new(every, self.context.now(), &mut self.rng));
        let pause = (self.device.profile() == Profile::SlowReader).then_some(SLOW_READ_PAUSE);
        // One timer for the whole session, moved only to come earlier: where the machine's time has moved on meanwhile,
        // the timer fires for nothing, and is set again.
        let mut timer = std::pin::pin!(sleep_until(self.due(messages.as_ref())));
        while !self.is_ending {
            // What the device is in for, should it no longer be online after this turn.
            let mut ending = Ending::Left;
            let due = self.due(messages.as_ref());
            if due < timer.deadline() {
                timer.as_mut().reset(due);
            }
            tokio::select! {
                message = next(socket, pause), if !is_silent => {
                    if let Some(ending) = self.took(message, messages.as_mut()) {
                        return Some(ending);
                    }
                }
                () = &mut timer => {
                    if !self.device.profile().ends_sessions() {
                        ending = Ending::GivenUp;
                    }
                    self.device.handle_timeout(self.context.now(), &mut self.rng);
                    timer.as_mut().reset(self.due(messages.as_ref()));
                }
                () = self.commands.given() => {
                    self.obey();
                    while self.absence == Some(Absence::PowerCut) && !self.is_ending {
                        self.commands.given().await;
                        self.obey();
                    }
                    if self.absence.take() == Some(Absence::Leave) {
                        ending = Ending::Goodbye;
                    }
                }
            }
            let is_sent = self.act(socket).await && self.say(socket, messages.as_mut()).await;
            if self.device.state() != State::Online {
                return Some(ending);
            }
            if !is_sent {
                self.device.handle_closed(None, self.context.now(), &mut self.rng);
                return Some(Ending::GivenUp);
            }
        }
        None
    }

    /// Tells the machine what came; says how to end, where that was the end.
    fn took(
        &mut self,
        message: Option<Result<Message, tungstenite::Error>>,
        messages: Option<&mut Messages>,
    ) -> Option<Ending> {
        let now = self.context.now();
        match message {
            Some(Ok(Message::Text(text))) => {
                self.device.handle_text(text.as_str(), now);
                if messages.is_some_and(|messages| messages.handle_text(text.as_str())) {
                    self.report(Event::Acked);
                }
            }
            Some(Ok(Message::Ping(_))) => self.device.handle_ping(now),
            Some(Ok(Message::Binary(_) | Message::Pong(_) | Message::Frame(_))) => self.device.handle_heard(now),
            Some(Ok(Message::Close(frame))) => {
                let (code, reason) = match &frame {
                    Some(frame) => (u16::from(frame.code), frame.reason.as_str()),
                    None => (CODE_NONE, ""),
                };
                self.device
                    .handle_closed(Some(CloseFrame { code, reason }), now, &mut self.rng);
                return Some(Ending::Answer { code });
            }
            Some(Err(_)) | None => {
                self.device.handle_closed(None, now, &mut self.rng);
                return Some(Ending::Lost);
            }
        }
        None
    }

    /// Does what the machine asks for. False: the socket did not take it.
    async fn act(&mut self, socket: &mut Socket) -> bool {
        let frame = match self.device.poll_action() {
            Some(Action::SendHeartbeat) => DeviceFrame::Heartbeat.to_json(),
            Some(Action::SendAck { id }) => {
                self.report(Event::Message);
                DeviceFrame::Ack { id: Cow::Borrowed(&id) }.to_json()
            }
            Some(Action::Update(_)) => {
                self.report(Event::Update);
                return true;
            }
            // `Abort` comes with leaving the session, which resets it; `Connect` never comes within one.
            Some(Action::Abort | Action::Connect) | None => return true,
        };
        send(socket, frame).await
    }

    /// Sends the message that is due, if one is. False: the socket did not take it.
    async fn say(&mut self, socket: &mut Socket, messages: Option<&mut Messages>) -> bool {
        let Some(frame) = messages.and_then(|messages| messages.handle_timeout(self.context.now())) else {
            return true;
        };
        self.report(Event::Sent);
        send(socket, frame).await
    }

    fn due(&self, messages: Option<&Messages>) -> Instant {
        let due = self
            .device
            .poll_timeout()
            .into_iter()
            .chain(messages.map(Messages::due))
            .min();
        due.map(|due| self.context.at(due))
            .unwrap_or_else(|| Instant::now() + IDLE_MAX)
    }
}

/// # Cancel safety
/// Safe: a message that was not returned is still to come. A slow reader's pause starts again.
async fn next(socket: &mut Socket, pause: Option<Duration>) -> Option<Result<Message, tungstenite::Error>> {
    if let Some(pause) = pause {
        sleep(pause).await;
    }
    socket.next().await
}

async fn send(socket: &mut Socket, frame: String) -> bool {
    matches!(timeout(SEND_MAX, socket.send(Message::text(frame))).await, Ok(Ok(())))
}

/// Close 1000, and the gateway's answer to it. A gateway that gives none is left without.
async fn say_goodbye(socket: &mut Socket) {
    let frame = protocol::CloseFrame {
        code: CloseCode::Normal,
        reason: "".into(),
    };
    let _ = timeout(GOODBYE_MAX, async {
        if socket.close(Some(frame)).await.is_ok() {
            drain(socket).await;
        }
    })
    .await;
}

/// Reads to the end, which also sends the answer to a close frame.
async fn drain(socket: &mut Socket) {
    while let Some(Ok(_)) = socket.next().await {}
}
