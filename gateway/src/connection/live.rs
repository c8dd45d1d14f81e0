//! A session, from its 101 to its close: one loop over mailbox, socket and timer, in a task of its own.
//!
//! [`seawall_proto::session::Session`] decides everything; this carries its actions out.

use std::{
    future::poll_fn,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use seawall_proto::{
    close::{Close, EndReason},
    cohorts::Figure,
    frame::ErrorCode,
    hello::SessionKind,
    id::SessionId,
    presence::{groups::GRACE, observer::HEALTH_WORST},
    resume::{Grant, Minted},
    session::{self, Action, Moment, OutBody, Received, Silence},
};
use tokio::{sync::oneshot, time::timeout};
use tokio_tungstenite::tungstenite::protocol::frame::{
    Frame,
    coding::{Data, OpCode},
};

use crate::{
    connection::{end::End, online::Online},
    edge::{address::Share, transport::Transport},
    node::Shared,
    session::{
        sessions::{Call, Command, Delivery, Outgoing, OutgoingBody},
        socket::{CLOSE_TIMEOUT, Inbound, Outbound, Socket},
    },
};

/// Messages whose delivery somebody waits for. Beyond it the oldest is no longer waited for: it counts as sent.
const WAITING_MAX: usize = 64;

/// Time for which a device may go offline after the grace of its group, and its last ping.
const RELEASE_MAX: Duration = Duration::from_mins(2);
/// Maximum time for which the kernel keeps the last data of a session that has ended.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(120);

/// What a session does that can't be done while it waits for whatever comes.
enum Step {
    /// The peer reads too slowly for what it is to be told.
    Write,
    End(End),
}

/// An upgraded connection with everything that it needs. Sessions live mostly in waiting, and there are many: what rarely
/// happens stands in a box of its own for as long as it happens, and what is common to all is shared.
pub(super) struct Live {
    online: Online,
    machine: session::Session,
    socket: Socket,
    /// Whoever waits to hear that a message arrived, oldest first.
    waiting: Vec<(Box<str>, oneshot::Sender<Delivery>)>,
    /// What its resume tokens are made from; `None` in a plain session, which has no frame for them.
    grant: Option<Box<Grant>>,
    messages_in: u32,
    messages_out: u32,
    /// Something lies in the socket's write buffer.
    has_fed: bool,
    /// The order to end it was taken; [`Online::order`] has its reason.
    is_ordered: bool,
    /// It waited for its peer to read since the last [`tick`](Self::tick).
    waited_for_peer: bool,
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
        shared.observer.moment(),
        shared.clock.wall(),
        &mut rand::rng(),
    )
}

/// Puts what the session says first, where that is text, behind the bytes of its 101.
pub(super) fn say_at_once(machine: &mut session::Session, bytes: &mut Vec<u8>) {
    if let Some(text) = machine.poll_text() {
        put_text(text, bytes);
    }
}

/// Puts a text frame behind the bytes of a 101.
pub(super) fn put_text(text: String, bytes: &mut Vec<u8>) {
    let frame = Frame::message(text, OpCode::Data(Data::Text), true);
    // A buffer in memory takes everything.
    let _ = frame.format(bytes);
}

impl Live {
    pub(super) fn open(
        online: Online,
        machine: session::Session,
        stream: Transport,
        leftover: &[u8],
        grant: Option<Box<Grant>>,
        connection: Share,
    ) -> Self {
        let shared = online.shared();
        let next = machine.poll_timeout(shared.observer.moment());
        shared.sessions.call_at(online.session(), next);
        // On a path that broke the kernel would end the connection of a held device, as if it were offline.
        let silent_max = shared.session_limits.silence_max() * (1 + u32::from(HEALTH_WORST));
        stream.keep_unacknowledged_for(silent_max + GRACE + RELEASE_MAX);
        Self {
            socket: Socket::new(stream, leftover, Arc::clone(&shared.socket_limits)),
            online,
            machine,
            waiting: Vec::new(),
            grant,
            is_ordered: false,
            waited_for_peer: false,
            messages_in: 0,
            messages_out: 0,
            has_fed: false,
            _connection: connection,
        }
    }

    /// Runs the session to its end.
    #[expect(
        clippy::manual_async_fn,
        reason = "the future of an async fn holds what it is passed twice: as an argument, and as the variable that it becomes"
    )]
    pub(super) fn run(mut self) -> impl Future<Output = ()> + Send {
        async move {
            let end = loop {
                match poll_fn(|cx| self.poll_step(cx)).await {
                    Step::End(end) => break end,
                    Step::Write => {
                        self.waited_for_peer = true;
                        if let Err(end) = Box::pin(self.act_or_outlast()).await {
                            break end;
                        }
                    }
                }
            };
            Box::pin(self.farewell(end)).await;
        }
    }

    /// Everything that needs no waiting but for whatever comes next.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        loop {
            while self.has_fed || self.machine.has_actions() {
                match self.poll_act(cx) {
                    Poll::Ready(Ok(())) => self.obey(),
                    Poll::Ready(Err(end)) => return Poll::Ready(Step::End(end)),
                    Poll::Pending => return Poll::Ready(Step::Write),
                }
            }
            if let Some(end) = ready!(self.poll_event(cx)) {
                return Poll::Ready(Step::End(end));
            }
        }
    }

    /// What comes next, in this order: orders are few and bounded; what a device has sent counts before its silence does.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<End>> {
        let call = self.online.session().poll_call(cx);
        if let Poll::Ready(Call::Mail) = call {
            self.obey();
            return Poll::Ready(None);
        }
        let heard = self.socket.poll_next(cx);
        if heard.is_pending() && call.is_pending() {
            return Poll::Pending;
        }
        if let Poll::Ready(inbound) = heard
            && let Some(end) = self.hear(inbound)
        {
            return Poll::Ready(Some(end));
        }
        if call.is_ready() {
            self.tick();
        }
        Poll::Ready(None)
    }

    /// As [`act_until_ordered`](Self::act_until_ordered). A peer out of reach has as much time as any silent device.
    async fn act_or_outlast(&mut self) -> Result<(), End> {
        match self.act_until_ordered().await {
            Err(End::Slow) if self.socket.is_out_of_reach() => self.outlast().await,
            acted => acted,
        }
    }

    /// A peer that does not read must not hold up an order to end its session: then what is being written gets a moment more.
    async fn act_until_ordered(&mut self) -> Result<(), End> {
        let handle = Arc::clone(self.online.session());
        let written = self.socket.written();
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
            Some(Command::Deliver(_)) | None => Err(End::Unheard {
                reason: if self.is_ordered {
                    self.online.order()
                } else {
                    EndReason::SlowReader
                },
                code: self.machine.pending_close().unwrap_or(&Close::Policy).code(),
                written,
            }),
        }
    }

    /// The peer takes nothing, and nothing comes from its machine: the path to it may be broken. So it is treated as any
    /// other device that is silent. Returns once it takes something again.
    async fn outlast(&mut self) -> Result<(), End> {
        let handle = Arc::clone(self.online.session());
        let written = self.socket.written();
        loop {
            let now = self.online.shared().observer.moment();
            self.machine.handle_stalled(now.observed);
            self.call_later(now);
            while let Some(action) = self.machine.poll_silence() {
                if let Action::Close(close) = action {
                    return Err(End::Closed(close));
                }
                self.handle_silence(&action);
            }
            let event = poll_fn(|cx| match handle.poll_order(cx) {
                Poll::Ready(call) => Poll::Ready(Ok(call)),
                Poll::Pending => self.socket.poll_flush(cx).map(Err),
            });
            match event.await {
                Err(flushed) => return flushed.map_err(End::from),
                Ok(Call::Mail) => {
                    self.obey();
                    return Err(End::Unheard {
                        reason: self.online.order(),
                        code: self.machine.pending_close().unwrap_or(&Close::Policy).code(),
                        written,
                    });
                }
                Ok(Call::Due) => self.tick(),
            }
            self.waited_for_peer = true;
            if self.socket.written() != written {
                return Ok(());
            }
            if !self.socket.is_out_of_reach() {
                return Err(End::Slow);
            }
        }
    }

    /// As [`poll_act`](Self::poll_act), but waits for the peer to read, as long as it does.
    async fn act(&mut self) -> Result<(), End> {
        loop {
            self.socket.flush().await?;
            if let Poll::Ready(done) = poll_fn(|cx| Poll::Ready(self.poll_act(cx))).await {
                return done;
            }
        }
    }

    /// Carries out what the machine decided, in its order, and writes it in one go. Pending where the peer does not read; to be called again
    /// then.
    fn poll_act(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        while self.machine.has_actions() {
            ready!(self.socket.poll_room(cx))?;
            let Some(action) = self.machine.poll_action() else {
                break;
            };
            let outbound = match action {
                Action::Text(text) => Outbound::Text(text),
                Action::Binary(bytes) => Outbound::Binary(bytes),
                Action::Ping => Outbound::Ping,
                Action::Received(received) => {
                    self.store(received);
                    continue;
                }
                Action::Complained(error) => {
                    self.online.shared().metrics.messages_in.increment(match error {
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
                Action::Close(close) => return Poll::Ready(Err(End::Closed(close))),
                Action::Silent | Action::Suspect | Action::HeardAgain | Action::AskKernel | Action::AskGroups => {
                    self.handle_silence(&action);
                    continue;
                }
            };
            self.count_bytes("out", outbound.payload_len());
            self.socket.feed(outbound, cx)?;
            self.has_fed = true;
        }
        if self.has_fed {
            ready!(self.socket.poll_flush(cx))?;
            self.has_fed = false;
            if !self.online.session().info.speaks_v1 {
                // A plain session has no acknowledgements: written is all that can be known.
                for (_, done) in self.waiting.drain(..) {
                    // Nobody waits any more.
                    let _ = done.send(Delivery::Sent);
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn obey(&mut self) {
        while let Some(command) = self.online.session().take() {
            match command {
                Command::Close(close) => {
                    self.is_ordered = true;
                    self.online.set_order(close.end_reason());
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
        let shared = self.online.shared();
        if let Some(minted) = minted(shared, self.grant.as_deref_mut(), id, occasion) {
            self.machine.handle_token(&minted, shared.clock.now());
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
        let now = self.online.shared().observer.moment();
        let fragments = self.socket.take_fragments();
        self.machine.handle_fragments(fragments, now);
        match inbound {
            Inbound::Text(text) => {
                self.count_bytes("in", text.len());
                self.machine.handle_text(&text, now);
            }
            Inbound::Binary(bytes) => {
                self.count_bytes("in", bytes.len());
                self.machine.handle_binary(&bytes, now);
            }
            Inbound::Control => self.machine.handle_control(now),
            Inbound::Goodbye(code) => return Some(End::Goodbye(code)),
            Inbound::BadGoodbye => return Some(End::BadGoodbye),
            Inbound::Broken(close) => return Some(End::Failed(close)),
            Inbound::Gone => return Some(End::Gone),
        }
        None
    }

    fn count_bytes(&self, direction: &'static str, len: usize) {
        if len == 0 {
            return;
        }
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        self.online.shared().metrics.session_bytes.add(direction, len);
        self.online.session().info.cohort().count(Figure::Bytes, len);
    }

    fn tick(&mut self) {
        let shared = self.online.shared();
        let observer = &shared.observer;
        let now = observer.moment();
        // A peer that does not read delays its own pings, and says nothing about this node.
        let has_waited = std::mem::take(&mut self.waited_for_peer);
        if let Some(after) = self.machine.ping_lag(now.real)
            && !has_waited
        {
            shared.metrics.heartbeat_lag_seconds.record(observer.note_ping(after));
        }
        self.machine.handle_timeout(now, observer.health());
        self.call_later(now);
    }

    /// Has this task called when the machine wants it.
    fn call_later(&self, now: Moment) {
        let next = self.machine.poll_timeout(now);
        self.online.shared().sessions.call_at(self.online.session(), next);
    }

    /// What the machine wants done about a device that is silent, or was.
    fn handle_silence(&mut self, action: &Action) {
        let (shared, session) = (self.online.shared(), self.online.session());
        let (silence, moment) = (&shared.silence, shared.observer.moment());
        let now = moment.observed;
        match action {
            Action::Silent => silence.handle_silent(session),
            Action::Suspect => silence.handle_suspect(session.id, now),
            Action::HeardAgain => silence.handle_heard(session.id, |heard| {
                if !session.is_closing() {
                    shared.note_resolved(session, heard, shared.clock.wall());
                }
            }),
            Action::AskKernel => {
                let mut view = self.socket.kernel_view();
                // While nothing can be written nothing is read: what lies unread may be older than the silence.
                view.has_unread &= !(self.waited_for_peer && view.last_data.is_some());
                let found = self.machine.handle_kernel(view, now);
                shared.metrics.silence_checks.increment(found.as_str());
            }
            Action::AskGroups => {
                let verdict = silence.verdict(session.id, shared.observer.health());
                self.machine.handle_verdict(verdict, now, &mut rand::rng());
            }
            Action::Text(_)
            | Action::Binary(_)
            | Action::Ping
            | Action::Received(_)
            | Action::Complained(_)
            | Action::Acked(_)
            | Action::RenewToken
            | Action::Close(_) => {}
        }
        self.call_later(moment);
    }

    /// Into the event buffer; a full one means no acknowledgement, so that the device keeps its message.
    fn store(&mut self, received: Received) {
        self.messages_in = self.messages_in.saturating_add(1);
        let info = &self.online.session().info;
        info.cohort().count(Figure::Messages, 1);
        let (device, external_id) = (info.device, info.external_id.as_deref());
        let id = received.id.clone();
        let shared = self.online.shared();
        let outcome =
            match shared
                .events
                .message(shared.clock.wall(), shared.clock.now(), device, external_id, received)
            {
                Ok(()) => {
                    if let Some(id) = id {
                        self.machine.handle_stored(&id);
                    }
                    "accepted"
                }
                Err(_) => "buffer_full",
            };
        shared.metrics.messages_in.increment(outcome);
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

    /// How long nothing was heard. The kernel knows the real time of it, and the machine what was observed.
    fn silence(&self) -> Silence {
        let observed = self.machine.silence(self.online.shared().observer.now());
        Silence {
            lasts: self.socket.kernel_view().last_data.unwrap_or(observed.lasts),
            ..observed
        }
    }

    /// Offline first, then the courtesies: nobody waits for a peer's goodbye.
    async fn farewell(self, end: End) {
        let reason = end.reason();
        let session = Arc::clone(self.online.session());
        let shared = self.online.shared();
        let now = shared.clock.now();
        let evidence = end.evidence(|| self.silence(), shared.clock.wall());
        self.online.end(reason, evidence);
        self.socket.keep_unacknowledged_for(UNACKNOWLEDGED_MAX);
        drop(self.waiting);
        tracing::debug!(
            reason = reason.as_str(),
            device.id = %session.info.device,
            session.id = %session.id,
            firmware.version = session.info.cohort().firmware.as_deref(),
            peer.addr = %session.info.peer(),
            duration_ms = now.saturating_since(session.info.opened_at).as_millis(),
            messages_in = self.messages_in,
            messages_out = self.messages_out,
            "session ended"
        );
        match end {
            End::Closed(close) => self.socket.close(&close).await,
            End::Failed(close) => self.socket.fail(&close).await,
            End::Goodbye(_) | End::BadGoodbye => self.socket.finish().await,
            End::Slow => self.socket.abort(),
            End::Unheard { written, .. } => self.socket.give_up(written),
            End::Gone => {}
        }
    }
}

/// A resume token for a session, where it may have one.
fn minted(shared: &Shared, grant: Option<&mut Grant>, session: SessionId, occasion: &'static str) -> Option<Minted> {
    let minted = shared.resume.mint(grant?, session, &shared.clock)?;
    shared.metrics.resume_tokens.increment(occasion);
    Some(minted)
}
