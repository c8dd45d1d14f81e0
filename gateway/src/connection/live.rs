//! A session, from its 101 to its close: one loop over mailbox, socket and timer, in a task of its own.
//!
//! [`seawall_proto::session::Session`] decides everything; this carries its actions out.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use seawall_proto::{
    close::Close,
    frame::ErrorCode,
    hello::SessionKind,
    id::SessionId,
    resume::{Grant, Minted},
    session::{self, Action, OutBody, Received},
};
use tokio::{
    sync::oneshot,
    time::{Sleep, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::protocol::frame::{
    Frame,
    coding::{Data, OpCode},
};

use crate::{
    address::Share,
    connection::online::Online,
    sessions::{Command, Delivery, Outgoing, OutgoingBody},
    socket::{CLOSE_TIMEOUT, Inbound, SendError, Socket, SocketLimits},
    state::Shared,
    transport::Transport,
};

/// Messages whose delivery somebody waits for. Beyond it the oldest is no longer waited for: it counts as sent.
const WAITING_MAX: usize = 64;

/// What a session waits for.
enum Event {
    /// The mailbox holds something.
    Mail,
    Heard(Inbound),
    /// The time that the machine named has come.
    Due,
}

/// How a session ended.
enum End {
    /// We close it.
    Closed(Close),
    /// The peer broke the protocol.
    Failed(Close),
    /// The peer said goodbye.
    Goodbye,
    /// The peer said goodbye because the protocol was broken, or by breaking it.
    BadGoodbye,
    /// The connection broke.
    Gone,
    /// The peer does not read.
    Slow,
    /// The peer does not read, not even what would tell it that its session ends for this reason.
    Unheard(&'static str),
}

impl End {
    /// The label of `seawall_closes_total`.
    const fn reason(&self) -> &'static str {
        match self {
            Self::Closed(close) | Self::Failed(close) => close.as_str(),
            Self::Goodbye => Close::Normal.as_str(),
            Self::BadGoodbye => Close::Protocol.as_str(),
            Self::Gone => "client_gone",
            Self::Slow => "slow_reader",
            Self::Unheard(reason) => reason,
        }
    }
}

impl From<SendError> for End {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Slow => Self::Slow,
            SendError::Gone => Self::Gone,
        }
    }
}

/// An upgraded connection with everything that it needs. A task is as large as its largest moment, and lives mostly in
/// waiting: so whatever is awaited but rarely runs stands in a box of its own, for as long as it runs.
pub(super) struct Live {
    shared: Shared,
    online: Online,
    machine: session::Session,
    socket: Socket,
    /// Whoever waits to hear that a message arrived, oldest first.
    waiting: Vec<(Box<str>, oneshot::Sender<Delivery>)>,
    /// What its resume tokens are made from; `None` in a plain session, which has no frame for them.
    grant: Option<Box<Grant>>,
    /// The reason of the order to end it, once that was taken.
    ordered: Option<&'static str>,
    messages_in: u32,
    messages_out: u32,
    /// Its place among the node's connections.
    _connection: Share,
}

/// The decisions of a session that is about to begin. `grant`: what its resume tokens are made from.
pub(super) fn machine(
    shared: &Shared,
    online: &Online,
    kind: SessionKind,
    grant: Option<&mut Grant>,
) -> session::Session {
    let minted = minted(shared, grant, online.session().id, "welcome");
    session::Session::open(
        kind,
        online.session().id,
        minted.as_ref(),
        Arc::clone(&shared.session_limits),
        shared.clock.now(),
        shared.clock.wall(),
        &mut rand::rng(),
    )
}

/// Puts what the session says first, where that is text, behind the bytes of its 101.
pub(super) fn say_at_once(machine: &mut session::Session, bytes: &mut Vec<u8>) {
    if let Some(text) = machine.poll_text() {
        let frame = Frame::message(text, OpCode::Data(Data::Text), true);
        // A buffer in memory takes everything.
        let _ = frame.format(bytes);
    }
}

impl Live {
    pub(super) fn open(
        shared: Shared,
        online: Online,
        machine: session::Session,
        stream: Transport,
        leftover: Vec<u8>,
        grant: Option<Box<Grant>>,
        connection: Share,
    ) -> Self {
        let limits = &shared.config.limits;
        let socket_limits = SocketLimits {
            frame_len_max: limits.frame_bytes_max,
            message_len_max: limits.message_bytes_max,
            write_timeout: limits.write_timeout(),
        };
        Self {
            socket: Socket::new(stream, leftover, socket_limits),
            shared,
            online,
            machine,
            waiting: Vec::new(),
            grant,
            ordered: None,
            messages_in: 0,
            messages_out: 0,
            _connection: connection,
        }
    }

    /// Runs the session to its end. Boxed, since a future holds what is passed to it twice (measured: 1,368 bytes a session
    /// without the box, 848 with it).
    pub(super) async fn run(mut self: Box<Self>) {
        let end = self.until_end().await;
        Box::pin(self.farewell(end)).await;
    }

    async fn until_end(&mut self) -> End {
        let timer = sleep_until(self.shared.clock.deadline(self.machine.poll_timeout()));
        tokio::pin!(timer);
        loop {
            if self.machine.has_actions() {
                if let Err(end) = Box::pin(self.act_until_ordered()).await {
                    return end;
                }
                self.obey();
                if self.machine.has_actions() {
                    continue;
                }
            }
            match poll_fn(|cx| self.poll_event(timer.as_mut(), cx)).await {
                Event::Mail => self.obey(),
                Event::Heard(inbound) => {
                    if let Some(end) = self.hear(inbound) {
                        return end;
                    }
                }
                Event::Due => self.tick(timer.as_mut()),
            }
        }
    }

    /// In this order: orders are few and bounded; what a device has sent counts before its silence does. By hand, since `select!` would
    /// hold a future of each kind for as long as the session waits.
    fn poll_event(&mut self, timer: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<Event> {
        if self.online.session().poll_mail(cx).is_ready() {
            return Poll::Ready(Event::Mail);
        }
        if let Poll::Ready(inbound) = self.socket.poll_next(cx) {
            return Poll::Ready(Event::Heard(inbound));
        }
        timer.poll(cx).map(|()| Event::Due)
    }

    /// A peer that does not read must not hold up an order to end its session: then what is being written gets a moment more.
    async fn act_until_ordered(&mut self) -> Result<(), End> {
        let handle = Arc::clone(self.online.session());
        {
            let mut acting = pin!(self.act());
            tokio::select! {
                biased;
                done = &mut acting => return done,
                () = handle.ordered_to_close() => {}
            }
            if let Ok(done) = timeout(CLOSE_TIMEOUT, acting).await {
                return done;
            }
        }
        match handle.take() {
            Some(Command::Close(close)) => Err(End::Closed(close)),
            // The order was taken before, and its close comes after what can't be written.
            Some(Command::Deliver(_)) | None => Err(End::Unheard(self.ordered.unwrap_or("slow_reader"))),
        }
    }

    /// Carries out what the machine decided, in its order, and writes it in one go.
    async fn act(&mut self) -> Result<(), End> {
        let mut has_fed = false;
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::Text(text) => self.socket.feed_text(text).await?,
                Action::Binary(bytes) => self.socket.feed_binary(bytes).await?,
                Action::Ping => self.socket.feed_ping().await?,
                Action::Received(received) => {
                    self.store(received);
                    continue;
                }
                Action::Complained(error) => {
                    self.shared.metrics.messages_in.increment(match error {
                        ErrorCode::BadFrame => "bad_frame",
                        ErrorCode::RateLimited => "rate_limited",
                    });
                    continue;
                }
                Action::Acked(id) => {
                    self.acknowledged(&id);
                    continue;
                }
                Action::RenewToken => {
                    self.renew_token("renewal");
                    continue;
                }
                Action::Close(close) => return Err(End::Closed(close)),
            }
            has_fed = true;
        }
        if has_fed {
            self.socket.flush().await?;
            if !self.online.session().info.speaks_v1 {
                // A plain session has no acknowledgements: written is all that can be known.
                for (_, done) in self.waiting.drain(..) {
                    // Nobody waits any more.
                    let _ = done.send(Delivery::Sent);
                }
            }
        }
        Ok(())
    }

    fn obey(&mut self) {
        while let Some(command) = self.online.session().take() {
            match command {
                Command::Close(close) => {
                    self.ordered = Some(close.as_str());
                    if self.machine.wants_token_before(&close) {
                        self.renew_token("drain");
                    }
                    self.machine.handle_close(close);
                }
                Command::Deliver(message) => self.deliver(message),
            }
        }
    }

    fn renew_token(&mut self, occasion: &'static str) {
        let id = self.online.session().id;
        if let Some(minted) = minted(&self.shared, self.grant.as_deref_mut(), id, occasion) {
            self.machine.handle_token(&minted, self.shared.clock.now());
        }
    }

    fn deliver(&mut self, message: Outgoing) {
        let body = match &message.body {
            OutgoingBody::Json(json) => OutBody::Json(json),
            OutgoingBody::Binary(bytes) => OutBody::Binary(bytes),
        };
        // What can't be said is dropped with its sender, who hears of it by that.
        if self.machine.handle_message_out(&message.id, body).is_ok() {
            self.messages_out = self.messages_out.saturating_add(1);
            self.waiting.retain(|(_, done)| !done.is_closed());
            if self.waiting.len() >= WAITING_MAX {
                let (_, done) = self.waiting.remove(0);
                // The one who waited may have given up.
                let _ = done.send(Delivery::Sent);
            }
            self.waiting.push((message.id, message.done));
        }
    }

    fn hear(&mut self, inbound: Inbound) -> Option<End> {
        let now = self.shared.clock.now();
        match inbound {
            Inbound::Text(text) => self.machine.handle_text(&text, now),
            Inbound::Binary(bytes) => self.machine.handle_binary(&bytes, now),
            Inbound::Control => self.machine.handle_control(now),
            Inbound::Goodbye => return Some(End::Goodbye),
            Inbound::BadGoodbye => return Some(End::BadGoodbye),
            Inbound::Broken(close) => return Some(End::Failed(close)),
            Inbound::Gone => return Some(End::Gone),
        }
        None
    }

    fn tick(&mut self, timer: Pin<&mut Sleep>) {
        self.machine.handle_timeout(self.shared.clock.now(), &mut rand::rng());
        timer.reset(self.shared.clock.deadline(self.machine.poll_timeout()));
    }

    /// Into the event buffer; a full one means no acknowledgement, so that the device keeps its message.
    fn store(&mut self, received: Received) {
        self.messages_in = self.messages_in.saturating_add(1);
        let device = self.online.session().info.device;
        let id = received.id.clone();
        let outcome = match self.shared.events.message(self.shared.clock.wall(), device, received) {
            Ok(()) => {
                if let Some(id) = id {
                    self.machine.handle_stored(&id);
                }
                "accepted"
            }
            Err(_) => "buffer_full",
        };
        self.shared.metrics.messages_in.increment(outcome);
    }

    fn acknowledged(&mut self, id: &str) {
        if let Some(at) = self.waiting.iter().position(|(waiting, _)| **waiting == *id) {
            let (_, done) = self.waiting.remove(at);
            if self.waiting.is_empty() {
                self.waiting = Vec::new();
            }
            // The one who waited may have given up.
            let _ = done.send(Delivery::Acked);
        }
    }

    /// Offline first, then the courtesies: nobody waits for a peer's goodbye.
    async fn farewell(self: Box<Self>, end: End) {
        let reason = end.reason();
        let session = Arc::clone(self.online.session());
        self.online.end(reason);
        drop(self.waiting);
        tracing::debug!(
            reason,
            device.id = %session.info.device,
            session.id = %session.id,
            firmware.version = session.info.cohort.firmware.as_deref(),
            peer.addr = %session.info.peer,
            duration_ms = self.shared.clock.wall().saturating_since(session.info.since).as_millis(),
            messages_in = self.messages_in,
            messages_out = self.messages_out,
            "session ended"
        );
        match end {
            End::Closed(close) => self.socket.close(&close).await,
            End::Failed(close) => self.socket.fail(&close).await,
            End::Goodbye | End::BadGoodbye => self.socket.finish().await,
            End::Gone | End::Slow | End::Unheard(_) => {}
        }
    }
}

/// A resume token for a session, where it may have one.
fn minted(shared: &Shared, grant: Option<&mut Grant>, session: SessionId, occasion: &'static str) -> Option<Minted> {
    let minted = shared.resume.mint(grant?, session, &shared.clock)?;
    shared.metrics.resume_tokens.increment(occasion);
    Some(minted)
}
