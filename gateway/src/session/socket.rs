//! A device's WebSocket, behind one type of our own: what comes in, what goes out, and how it ends.
//!
//! The library's types stop here, so that what is under them (its buffers, its frames) can change without the session
//! noticing. Start with [`Socket`]. Buffers are small and bounded, and an idle socket has none.

mod aligned;

use std::{
    future::poll_fn,
    io,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use seawall_proto::{close::Close, session::KernelView};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, sleep, timeout},
};
use tokio_tungstenite::tungstenite::{
    Error, Message, Utf8Bytes,
    error::CapacityError,
    protocol::{CloseFrame, Role, WebSocketConfig, WebSocketContext, frame::coding::CloseCode},
};

use self::aligned::{Aligned, First, Lone, Overlong, PING, PONG, Unread, write_lone};

use crate::{edge::transport::Transport, runtime::config::Limits};

/// The library's read buffer, made for each message. Most fit; what does not is copied in pieces of this size, which costs no system call,
/// since [`Aligned`] reads by the large piece.
const READ_BUFFER_LEN: usize = 256;

/// Frames said together go out in one write up to this many bytes.
const WRITE_BUFFER_LEN: usize = 4 * 1024;

/// Room for what a frame has around its payload.
const ENVELOPE_LEN: usize = 1024;

/// Time for the peer to answer our close frame. Then the connection is dropped. Less than the 2 s that a process has for its end.
pub const CLOSE_TIMEOUT: Duration = Duration::from_millis(1500);

/// Longest time from the first to the last frame of one message: 64 KiB at half a kilobyte a second. A gap between two
/// frames counts for 30 s at most, so that a process that was stopped ends no session.
const MESSAGE_TIME_MAX: Duration = Duration::from_secs(120);

/// Maximum size of what is still read from a peer that was sent a close frame, in bytes: what may be under way until it
/// reads that. A peer that sends on without end would keep a core busy until the wait for its close frame ends.
const LAST_MESSAGES_LEN_MAX: usize = 1024 * 1024;
/// What a message costs beside its payload, in bytes, where many empty ones are read.
const MESSAGE_COST: usize = 16;

/// Longest time that what was fed may take to be written, in times of the write timeout: for a peer that reads, but
/// never fast enough.
const WRITE_TIMEOUTS_MAX: u32 = 10;

/// Bytes still read from a peer after its connection was given up, so that a reset does not destroy the close frame.
const DRAIN_LEN_MAX: usize = 64 * 1024;

/// The code that a close frame without one is taken to have (RFC 6455 §7.1.5).
pub const NO_CODE: u16 = 1005;

/// Bounds of one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketLimits {
    /// Largest frame taken, in bytes; then 1009.
    pub frame_len_max: usize,
    /// Largest message taken or sent, in bytes; then 1009.
    pub message_len_max: usize,
    /// Longest time in which not a byte can be written; then the peer does not read, and is dropped.
    pub write_timeout: Duration,
    /// Longest time from the first to the last frame of a message; then 1008.
    pub message_time_max: Duration,
}

impl SocketLimits {
    /// As the operator set them.
    #[must_use]
    pub const fn of(limits: &Limits) -> Self {
        Self {
            frame_len_max: limits.frame_bytes_max,
            message_len_max: limits.message_bytes_max,
            write_timeout: limits.write_timeout(),
            message_time_max: MESSAGE_TIME_MAX,
        }
    }
}

/// What came in.
#[derive(Debug)]
pub enum Inbound {
    /// The text borrows the read buffer: copy what is kept.
    Text(Utf8Bytes),
    /// The bytes borrow the read buffer: copy what is kept.
    Binary(Bytes),
    /// A ping or a pong. Pings are answered by themselves.
    Control,
    /// The peer said goodbye, with this code; [`NO_CODE`] if it named none. Finish with [`Socket::finish`].
    Goodbye(u16),
    /// The same because the protocol was broken: by us, as the peer says, or by its own goodbye, whose code must not be sent. Either
    /// way it has been answered 1002.
    BadGoodbye,
    /// The peer broke the protocol: close with this, and [`Socket::fail`].
    Broken(Close),
    /// The connection is gone, without a word.
    Gone,
}

/// What goes out, as one frame.
#[derive(Debug)]
pub enum Outbound {
    Text(String),
    Binary(Vec<u8>),
    Ping,
}

impl Outbound {
    /// Length of the payload of a data frame, in bytes; 0 for a ping.
    pub fn payload_len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
            Self::Ping => 0,
        }
    }
}

impl From<Outbound> for Message {
    fn from(outbound: Outbound) -> Self {
        match outbound {
            Outbound::Text(text) => Self::Text(text.into()),
            Outbound::Binary(bytes) => Self::Binary(bytes.into()),
            Outbound::Ping => Self::Ping(Bytes::new()),
        }
    }
}

/// Why nothing more can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    #[error("the peer does not read")]
    Slow,
    #[error("the connection is gone")]
    Gone,
}

impl From<Error> for SendError {
    fn from(error: Error) -> Self {
        match error {
            // Full of answers to pings that the peer does not read.
            Error::WriteBufferFull(_) => Self::Slow,
            Error::ConnectionClosed
            | Error::AlreadyClosed
            | Error::Io(_)
            | Error::Tls(_)
            | Error::Capacity(_)
            | Error::Protocol(_)
            | Error::Utf8(_)
            | Error::AttackAttempt
            | Error::Url(_)
            | Error::Http(_)
            | Error::HttpFormat(_) => Self::Gone,
        }
    }
}

/// An upgraded connection.
#[derive(Debug)]
pub struct Socket {
    transport: Transport,
    limits: Arc<SocketLimits>,
    /// An idle socket has none.
    busy: Option<Box<Busy>>,
    /// Reading has come to its end.
    has_ended: bool,
}

/// What messages under way need, in or out.
#[derive(Debug)]
struct Busy {
    context: WebSocketContext,
    unread: Unread,
    /// The transport takes no more for now: what is in the write buffer goes first.
    is_blocked: bool,
    /// Of a control frame only the first of two bytes went out.
    half_sent: bool,
    /// Bytes that the transport has taken. Wraps.
    written: u64,
}

impl Busy {
    fn new(limits: &SocketLimits, unread: Unread) -> Box<Self> {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_LEN)
            .write_buffer_size(WRITE_BUFFER_LEN)
            // Pings are answered into this buffer: without a bound a peer that pings and never reads would fill the memory.
            .max_write_buffer_size(WRITE_BUFFER_LEN + 2 * (limits.message_len_max + ENVELOPE_LEN))
            .max_frame_size(Some(limits.frame_len_max))
            .max_message_size(Some(limits.message_len_max));
        Box::new(Self {
            context: WebSocketContext::new(Role::Server, Some(config)),
            unread,
            is_blocked: false,
            half_sent: false,
            written: 0,
        })
    }
}

impl Socket {
    /// Takes over a connection behind its 101. `leftover` is what the peer sent without waiting for it.
    #[must_use]
    pub fn new(transport: Transport, leftover: &[u8], limits: Arc<SocketLimits>) -> Self {
        let busy = (!leftover.is_empty()).then(|| Busy::new(&limits, Unread::new(leftover)));
        Self {
            transport,
            limits,
            busy,
            has_ended: false,
        }
    }

    /// The next thing from the peer. Wakes the task of `cx` once there may be one.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Inbound> {
        Poll::Ready(match ready!(self.poll_message(cx)) {
            Some(Ok(Message::Text(text))) => Inbound::Text(text),
            Some(Ok(Message::Binary(bytes))) => Inbound::Binary(bytes),
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => Inbound::Control,
            // The library has put this in the place of a code that must not be sent.
            Some(Ok(Message::Close(Some(frame)))) if frame.code == CloseCode::Protocol => Inbound::BadGoodbye,
            Some(Ok(Message::Close(frame))) => Inbound::Goodbye(frame.map_or(NO_CODE, |frame| frame.code.into())),
            Some(Err(error)) => broken_by(&error).map_or(Inbound::Gone, Inbound::Broken),
            None => Inbound::Gone,
        })
    }

    /// The next thing from the peer.
    ///
    /// # Cancel safety
    /// Safe: nothing that was read is lost.
    pub async fn next(&mut self) -> Inbound {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Number of fragments that the message had which [`poll_next`](Self::poll_next) has just returned; 0 for a control
    /// frame.
    pub fn take_fragments(&mut self) -> u32 {
        self.busy.as_mut().map_or(0, |busy| busy.unread.take_fragments())
    }

    /// What the kernel knows of the connection.
    #[must_use]
    pub fn kernel_view(&self) -> KernelView {
        self.transport.kernel_view()
    }

    /// Whether nothing at all came from the peer's machine for the time of a write: it is not there, or out of reach. A
    /// peer that only does not read still acknowledges the kernel's probes.
    #[must_use]
    pub fn is_out_of_reach(&self) -> bool {
        let last = self.transport.last_segment();
        last.is_some_and(|last| last >= self.limits.write_timeout)
    }

    /// Bounds the time for which the kernel keeps unacknowledged data, even after the connection was closed.
    pub fn keep_unacknowledged_for(&self, time_max: Duration) {
        self.transport.keep_unacknowledged_for(time_max);
    }

    /// Ready once the write buffer has room for a frame.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    pub fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SendError>> {
        if self.busy.as_ref().is_some_and(|busy| busy.is_blocked) {
            return self.poll_flush(cx);
        }
        Poll::Ready(Ok(()))
    }

    /// Puts a frame into the write buffer. Ask for [room](Self::poll_room) before.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    pub fn feed(&mut self, outbound: Outbound, cx: &mut Context<'_>) -> Result<(), SendError> {
        if matches!(outbound, Outbound::Ping) && self.write_lone(PING, cx) {
            return Ok(());
        }
        self.write(outbound.into(), cx).map_err(SendError::from)
    }

    /// Writes what was fed. Sets no bound to the time that takes.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SendError>> {
        self.poll_sent(cx).map_err(SendError::from)
    }

    /// Writes what was fed. Gives up where nothing can be written for the time of a write, or where it takes many times
    /// as long in all.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    ///
    /// # Cancel safety
    /// Safe: what was not written stays in the buffer.
    pub async fn flush(&mut self) -> Result<(), SendError> {
        self.while_it_moves(Self::poll_flush).await
    }

    /// Sends one frame, for a caller that does nothing else meanwhile.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    pub async fn send(&mut self, outbound: Outbound) -> Result<(), SendError> {
        self.while_it_moves(Self::poll_room).await?;
        let mut outbound = Some(outbound);
        poll_fn(|cx| Poll::Ready(outbound.take().map_or(Ok(()), |outbound| self.feed(outbound, cx)))).await?;
        self.flush().await
    }

    /// Waits for a write that `poll` carries out, as long as bytes are taken.
    async fn while_it_moves(
        &mut self,
        poll: impl Fn(&mut Self, &mut Context<'_>) -> Poll<Result<(), SendError>>,
    ) -> Result<(), SendError> {
        let limit = self.limits.write_timeout;
        let last = Instant::now() + limit * WRITE_TIMEOUTS_MAX;
        let mut written = self.written();
        let mut timer = pin!(sleep(limit));
        poll_fn(|cx| {
            if let Poll::Ready(done) = poll(self, cx) {
                return Poll::Ready(done);
            }
            if self.written() != written {
                written = self.written();
                timer.as_mut().reset((Instant::now() + limit).min(last));
            }
            timer.as_mut().poll(cx).map(|()| Err(SendError::Slow))
        })
        .await
    }

    /// Changes with each byte that the kernel has taken for the peer, as far as it can be seen.
    #[must_use]
    pub fn written(&self) -> u64 {
        let plain = self.busy.as_ref().map_or(0, |busy| busy.written);
        plain.wrapping_add(self.transport.written_by_tls())
    }

    /// Sends a close frame, and waits a moment for the peer's.
    pub async fn close(self, close: &Close) {
        self.close_within(close, CLOSE_TIMEOUT).await;
    }

    /// Sends a close frame, and waits at most `limit` for the peer's.
    pub async fn close_within(mut self, close: &Close, limit: Duration) {
        let written = self.written();
        match self.send_close(close).await {
            Ok(()) => self.finish_within(limit).await,
            Err(SendError::Slow) => self.give_up(written),
            Err(SendError::Gone) => {}
        }
    }

    /// Ends the connection to a peer that was too slow: with a reset only where it has taken nothing since `written`.
    /// From a peer that reads, a reset would take what the kernel still holds for it.
    pub fn give_up(self, written: u64) {
        if self.written() == written {
            self.abort();
        }
    }

    /// Ends the connection to a peer that does not read. What the kernel still holds for it is dropped at once.
    pub fn abort(self) {
        self.transport.abort();
    }

    /// Answers the peer's close frame, which the library does while it reads, and ends the connection.
    pub async fn finish(self) {
        self.finish_within(CLOSE_TIMEOUT).await;
    }

    async fn finish_within(mut self, limit: Duration) {
        let last_words = async {
            let mut read_len = 0;
            while read_len < LAST_MESSAGES_LEN_MAX
                && let Some(Ok(message)) = poll_fn(|cx| self.poll_message(cx)).await
            {
                read_len += message.len() + MESSAGE_COST;
            }
            self.transport.say_goodbye().await;
        };
        // Whether the peer answers or not, the connection ends here.
        let _ = timeout(limit, last_words).await;
    }

    /// Sends a close frame to a peer whose frames can't be read any further (RFC 6455 §7.1.7).
    pub async fn fail(mut self, close: &Close) {
        let written = self.written();
        match self.send_close(close).await {
            Ok(()) => {
                drain(&mut self.transport, DRAIN_LEN_MAX, CLOSE_TIMEOUT).await;
            }
            Err(SendError::Slow) => self.give_up(written),
            Err(SendError::Gone) => {}
        }
    }

    async fn send_close(&mut self, close: &Close) -> Result<(), SendError> {
        let frame = CloseFrame {
            code: CloseCode::from(close.code()),
            reason: close.reason().into(),
        };
        let limit = self.limits.write_timeout.min(CLOSE_TIMEOUT);
        let mut closing = Some(Message::Close(Some(frame)));
        let sending = poll_fn(|cx| {
            ready!(self.poll_room(cx))?;
            if let Some(closing) = closing.take() {
                self.write(closing, cx)?;
            }
            self.poll_flush(cx)
        });
        in_time(limit, sending).await
    }

    fn write(&mut self, message: Message, cx: &mut Context<'_>) -> Result<(), Error> {
        let written = self.with(cx, |context, io| context.write(io, message));
        if let Some(busy) = &mut self.busy {
            busy.is_blocked = written.is_pending();
        }
        match written {
            Poll::Ready(done) => done,
            // It is in the buffer.
            Poll::Pending => Ok(()),
        }
    }

    /// Writes a control frame without payload, if nothing else is under way. False: it is to be written as any other.
    fn write_lone(&mut self, first: u8, cx: &mut Context<'_>) -> bool {
        if self.busy.is_some() {
            return false;
        }
        match write_lone(&mut self.transport, first, cx) {
            Lone::Written => true,
            Lone::Half => {
                let mut busy = Busy::new(&self.limits, Unread::default());
                (busy.half_sent, busy.is_blocked) = (true, true);
                self.busy = Some(busy);
                true
            }
            Lone::Untouched => false,
        }
    }

    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if self.busy.is_none() {
            return Poll::Ready(Ok(()));
        }
        let flushed = ready!(self.with(cx, |context, io| context.flush(io)));
        if let Some(busy) = &mut self.busy {
            busy.is_blocked = false;
        }
        Poll::Ready(match flushed {
            Ok(()) => {
                self.rest();
                Ok(())
            }
            // The close frame was the last thing to write.
            Err(Error::ConnectionClosed) => Ok(()),
            error => error,
        })
    }

    /// `None` where nothing more comes.
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, Error>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        if self.busy.is_none() {
            match ready!(Unread::poll_first(&mut self.transport, cx)) {
                Ok(First::Pong) => return Poll::Ready(Some(Ok(Message::Pong(Bytes::new())))),
                Ok(First::Ping) => {
                    if !self.write_lone(PONG, cx)
                        && let Err(error) = self.write(Message::Pong(Bytes::new()), cx)
                    {
                        self.has_ended = true;
                        return Poll::Ready(Some(Err(error)));
                    }
                    return Poll::Ready(Some(Ok(Message::Ping(Bytes::new()))));
                }
                Ok(First::Other(unread)) => self.busy = Some(Busy::new(&self.limits, unread)),
                Ok(First::End) | Err(_) => {
                    self.has_ended = true;
                    return Poll::Ready(None);
                }
            }
        }
        let Poll::Ready(read) = self.with(cx, |context, io| context.read(io)) else {
            if self.is_between_messages() {
                // What can't be written shows at the next write, or at the end of reading.
                let _ = self.poll_sent(cx);
            }
            return Poll::Pending;
        };
        self.has_ended = read.is_err();
        Poll::Ready(match read {
            Err(Error::ConnectionClosed | Error::AlreadyClosed) => None,
            read => Some(read),
        })
    }

    /// Asks the library, which is set up where it is needed. What it can't do now is pending.
    fn with<T>(
        &mut self,
        cx: &mut Context<'_>,
        act: impl FnOnce(&mut WebSocketContext, &mut Aligned<'_, '_>) -> Result<T, Error>,
    ) -> Poll<Result<T, Error>> {
        let busy = self
            .busy
            .get_or_insert_with(|| Busy::new(&self.limits, Unread::default()));
        let Busy {
            context,
            unread,
            written,
            half_sent,
            ..
        } = &mut **busy;
        let transport = &mut self.transport;
        let mut aligned = Aligned {
            transport,
            unread,
            written,
            half_sent,
            cx,
            message_time_max: self.limits.message_time_max,
        };
        match act(context, &mut aligned) {
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
            done => Poll::Ready(done),
        }
    }

    /// The library holds no part of a message that came, and has not begun to close the connection.
    fn is_between_messages(&self) -> bool {
        self.busy
            .as_ref()
            .is_some_and(|busy| busy.unread.is_between_messages() && busy.context.can_write())
    }

    /// Gives everything back that messages needed, where everything was written and no message is under way.
    fn rest(&mut self) {
        if self.is_between_messages() && !self.busy.as_ref().is_some_and(|busy| busy.half_sent) {
            self.busy = None;
        }
    }
}

async fn in_time(limit: Duration, sent: impl Future<Output = Result<(), SendError>>) -> Result<(), SendError> {
    timeout(limit, sent).await.unwrap_or(Err(SendError::Slow))
}

/// The close that answers an error in reading; `None` where nobody is left to read it.
fn broken_by(error: &Error) -> Option<Close> {
    match error {
        Error::Capacity(CapacityError::MessageTooLong { .. } | CapacityError::TooManyHeaders) => Some(Close::TooBig),
        Error::Utf8(_) => Some(Close::NotUtf8),
        Error::Protocol(error) if !is_loss(error) => Some(Close::Protocol),
        Error::WriteBufferFull(_) | Error::AttackAttempt => Some(Close::Policy),
        Error::Io(error) if error.get_ref().is_some_and(|cause| cause.is::<Overlong>()) => Some(Close::Policy),
        Error::Protocol(_)
        | Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Io(_)
        | Error::Tls(_)
        | Error::Url(_)
        | Error::Http(_)
        | Error::HttpFormat(_) => None,
    }
}

fn is_loss(error: &tokio_tungstenite::tungstenite::error::ProtocolError) -> bool {
    use tokio_tungstenite::tungstenite::error::ProtocolError;
    matches!(
        error,
        ProtocolError::ResetWithoutClosingHandshake
            | ProtocolError::SendAfterClosing
            | ProtocolError::ReceivedAfterClosing
    )
}

/// Ends our half, then reads and forgets what the peer still sends, up to a bound in bytes and time: closing a socket with
/// unread bytes makes the kernel send a reset, and that destroys an answer which the peer has not read yet. Returns how
/// many bytes came.
pub async fn drain(stream: &mut Transport, len_max: usize, time_max: Duration) -> usize {
    let mut drained = 0;
    let reading = async {
        stream.shutdown().await?;
        let mut scratch = BytesMut::with_capacity(DRAIN_CHUNK_LEN);
        while drained < len_max {
            scratch.clear();
            match stream.read_buf(&mut scratch).await? {
                0 => break,
                read => drained += read,
            }
        }
        io::Result::Ok(())
    };
    // A peer that sends on, or is gone: either way it had its chance.
    let _ = timeout(time_max, reading).await;
    drained
}

const DRAIN_CHUNK_LEN: usize = 2 * 1024;

#[cfg(test)]
mod tests {
    use seawall_proto::close::REASON_LEN_MAX;
    use socket2::SockRef;
    use tokio::net::{TcpListener, TcpSocket, TcpStream};

    use super::*;

    const LIMITS: SocketLimits = SocketLimits {
        frame_len_max: 1000,
        message_len_max: 1000,
        write_timeout: Duration::from_millis(300),
        message_time_max: Duration::from_millis(200),
    };

    async fn pair() -> (TcpStream, Socket) {
        pair_with(LIMITS).await
    }

    async fn pair_with(limits: SocketLimits) -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let server = listener.accept().await.unwrap().0;
        (client, Socket::new(server.into(), &[], Arc::new(limits)))
    }

    /// A peer that reads little at a time, with a socket whose kernel buffers hold little.
    async fn slow_pair(message_len_max: usize) -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpSocket::new_v4().unwrap();
        client.set_recv_buffer_size(4_096).unwrap();
        let client = client.connect(listener.local_addr().unwrap()).await.unwrap();
        let server = listener.accept().await.unwrap().0;
        SockRef::from(&server).set_send_buffer_size(8_192).unwrap();
        let limits = SocketLimits {
            message_len_max,
            ..LIMITS
        };
        (client, Socket::new(server.into(), &[], Arc::new(limits)))
    }

    /// Reads 4 KiB each 20 ms until the end: 200 KB a second.
    async fn read_slowly(mut client: TcpStream) -> io::Result<usize> {
        let (mut len, mut chunk) = (0, [0; 4_096]);
        loop {
            match client.read(&mut chunk).await? {
                0 => return Ok(len),
                read => len += read,
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn peer_that_reads_slowly_gets_a_message_that_takes_longer_than_a_write_may() {
        let len = 400_000;
        let (client, mut socket) = slow_pair(len).await;
        let reading = tokio::spawn(read_slowly(client));
        let began = Instant::now();

        let sent = timeout(Duration::from_secs(60), socket.send(Outbound::Text("x".repeat(len)))).await;

        assert_eq!(sent, Ok(Ok(())));
        assert!(began.elapsed() > 2 * LIMITS.write_timeout, "{:?}", began.elapsed());
        drop(socket);
        assert!(reading.await.unwrap().unwrap() > len);
    }

    #[tokio::test]
    async fn peer_that_never_reads_fast_enough_is_given_up_in_the_end() {
        let len = 4_000_000;
        let (client, mut socket) = slow_pair(len).await;
        let reading = tokio::spawn(read_slowly(client));

        let sent = timeout(Duration::from_secs(60), socket.send(Outbound::Text("x".repeat(len)))).await;

        assert_eq!(sent, Ok(Err(SendError::Slow)));
        drop(socket);
        assert!(reading.await.unwrap().unwrap() < len);
    }

    #[tokio::test]
    async fn close_takes_nothing_from_a_peer_that_reads_slowly() {
        let len = 400_000;
        let (client, mut socket) = slow_pair(len).await;
        let fed = poll_fn(|cx| Poll::Ready(socket.feed(Outbound::Text("x".repeat(len)), cx))).await;
        let reading = tokio::spawn(read_slowly(client));

        fed.unwrap();
        timeout(Duration::from_secs(60), socket.close(&Close::Replaced))
            .await
            .unwrap();

        // Its end, and no reset.
        let read = reading.await.unwrap();
        assert!(read.as_ref().is_ok_and(|len| *len > 0), "{read:?}");
    }

    /// A masked frame with a key of zeros.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![first];
        match u8::try_from(payload.len()) {
            Ok(len) if len < 126 => bytes.push(0x80 | len),
            _ => {
                bytes.push(0x80 | 126);
                bytes.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
            }
        }
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(payload);
        bytes
    }

    async fn all_of(mut client: TcpStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        timeout(Duration::from_secs(5), client.read_to_end(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        bytes
    }

    #[tokio::test]
    async fn frames_that_break_the_protocol_have_their_own_close() {
        for (bytes, close) in [
            (frame(0x81, &[0xff, 0xfe]), Close::NotUtf8),
            (frame(0x81, &[b'x'; 1001]), Close::TooBig),
            (frame(0x83, b"x"), Close::Protocol),
            (frame(0xc1, b"x"), Close::Protocol),
            (vec![0x81, 0x01, b'x'], Close::Protocol),
        ] {
            let (mut client, mut socket) = pair().await;
            client.write_all(&bytes).await.unwrap();

            let Inbound::Broken(found) = socket.next().await else {
                panic!("{bytes:?} was taken");
            };
            let code = found.code();
            let failing = tokio::spawn(async move { socket.fail(&found).await });

            assert_eq!(code, close.code());
            let answer = all_of(client).await;
            failing.await.unwrap();
            assert_eq!(answer[0], 0x88, "{close:?}");
            assert_eq!(answer[2..4], close.code().to_be_bytes());
        }
    }

    #[tokio::test]
    async fn message_in_fragments_without_end_is_ended() {
        // Not by its time.
        let (mut client, mut socket) = pair_with(SocketLimits {
            message_time_max: Duration::from_secs(3_600),
            ..LIMITS
        })
        .await;
        let flood = tokio::spawn(async move {
            let empty = frame(0x00, b"").repeat(1_000);
            let mut sent = 0;
            client.write_all(&frame(0x01, b"x")).await.unwrap();
            while client.write_all(&empty).await.is_ok() {
                sent += 1_000;
            }
            sent
        });

        let inbound = timeout(Duration::from_secs(20), socket.next()).await.unwrap();

        assert!(matches!(inbound, Inbound::Broken(Close::Policy)), "{inbound:?}");
        socket.fail(&Close::Policy).await;
        assert!(flood.await.unwrap() > 0);
    }

    #[tokio::test]
    async fn message_in_many_fragments_arrives() {
        let (mut client, mut socket) = pair().await;
        client.write_all(&frame(0x01, b"x")).await.unwrap();
        client.write_all(&frame(0x00, b"x").repeat(900)).await.unwrap();
        client.write_all(&frame(0x80, b"")).await.unwrap();

        let inbound = socket.next().await;

        assert!(
            matches!(&inbound, Inbound::Text(text) if text.len() == 901),
            "{inbound:?}"
        );
    }

    #[tokio::test]
    async fn fragments_of_each_message_are_counted() {
        let (mut client, mut socket) = pair().await;
        for _ in 0..2 {
            client.write_all(&frame(0x01, b"x")).await.unwrap();
            client.write_all(&frame(0x00, b"x").repeat(10)).await.unwrap();
            client.write_all(&frame(0x89, b"")).await.unwrap();
            client.write_all(&frame(0x80, b"")).await.unwrap();
        }
        client.write_all(&frame(0x81, b"whole")).await.unwrap();

        let mut counted = Vec::new();
        while counted.len() < 3 {
            if let Inbound::Text(text) = socket.next().await {
                counted.push((text.len(), socket.take_fragments()));
            }
        }

        assert_eq!(counted, [(11, 12), (11, 12), (5, 1)]);
    }

    #[tokio::test]
    async fn peer_that_sends_on_after_its_close_is_not_read_for_long() {
        let (mut client, socket) = pair().await;
        let flood = tokio::spawn(async move {
            let pongs = frame(0x8a, b"").repeat(1_000);
            let mut sent = 0;
            while client.write_all(&pongs).await.is_ok() {
                sent += 1_000;
            }
            sent
        });

        socket.close(&Close::Policy).await;

        // The rest was in the buffers of the kernel.
        let sent = timeout(Duration::from_secs(20), flood).await.unwrap().unwrap();
        assert!(sent < 20 * LAST_MESSAGES_LEN_MAX / MESSAGE_COST, "{sent} frames");
    }

    #[tokio::test]
    async fn message_that_takes_too_long_is_ended_whatever_comes_between() {
        let (mut client, mut socket) = pair().await;
        let slow = tokio::spawn(async move {
            client.write_all(&frame(0x01, b"x")).await.unwrap();
            // Pongs show that the peer lives, and do not help.
            while client.write_all(&frame(0x8a, b"")).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });

        let ended = async {
            loop {
                let inbound = socket.next().await;
                if !matches!(inbound, Inbound::Control) {
                    break inbound;
                }
            }
        };
        let inbound = timeout(Duration::from_secs(20), ended).await.unwrap();

        assert!(matches!(inbound, Inbound::Broken(Close::Policy)), "{inbound:?}");
        drop(socket);
        slow.await.unwrap();
    }

    #[tokio::test]
    async fn close_waits_for_the_peer_to_agree() {
        let (mut client, socket) = pair().await;
        let closing = tokio::spawn(async move { socket.close(&Close::Replaced).await });

        let mut header = [0; 4];
        client.read_exact(&mut header).await.unwrap();
        client.write_all(&frame(0x88, &4500_u16.to_be_bytes())).await.unwrap();

        closing.await.unwrap();
        assert_eq!(header[0], 0x88);
        assert!(usize::from(header[1]) <= REASON_LEN_MAX + 2);
        assert_eq!(header[2..4], 4500_u16.to_be_bytes());
    }

    #[tokio::test]
    async fn lone_control_frames_are_handled_without_a_buffer_and_all_others_with_one() {
        let (mut client, mut socket) = pair().await;

        client.write_all(&frame(0x8a, b"")).await.unwrap();
        assert!(matches!(socket.next().await, Inbound::Control));
        assert!(socket.busy.is_none());
        client.write_all(&frame(0x89, b"")).await.unwrap();
        assert!(matches!(socket.next().await, Inbound::Control));
        assert!(socket.busy.is_none());
        socket.send(Outbound::Ping).await.unwrap();
        assert!(socket.busy.is_none());
        let both = [frame(0x89, b""), frame(0x89, b"x"), frame(0x81, b"text")].concat();
        client.write_all(&both).await.unwrap();
        for _ in 0..2 {
            assert!(matches!(socket.next().await, Inbound::Control));
        }
        assert!(matches!(socket.next().await, Inbound::Text(text) if text.as_str() == "text"));
        socket.flush().await.unwrap();
        drop(socket);

        let bytes = all_of(client).await;
        assert_eq!(bytes, [0x8a, 0, 0x89, 0, 0x8a, 0, 0x8a, 1, b'x']);
    }

    #[tokio::test]
    async fn control_frame_that_was_half_sent_goes_on_before_all_others() {
        let (client, mut socket) = pair().await;
        let mut busy = Busy::new(&socket.limits, Unread::default());
        (busy.half_sent, busy.is_blocked) = (true, true);
        socket.busy = Some(busy);

        socket.send(Outbound::Text("x".to_owned())).await.unwrap();

        assert!(socket.busy.is_none());
        drop(socket);
        assert_eq!(all_of(client).await, [0, 0x81, 1, b'x']);
    }

    #[tokio::test]
    async fn goodbye_is_answered() {
        let (mut client, mut socket) = pair().await;
        client.write_all(&frame(0x88, &1000_u16.to_be_bytes())).await.unwrap();

        assert!(matches!(socket.next().await, Inbound::Goodbye(1000)));
        socket.finish().await;

        assert_eq!(all_of(client).await, [0x88, 2, 0x03, 0xe8]);
    }

    #[tokio::test]
    async fn goodbye_with_a_code_that_must_not_be_sent_is_a_bad_one() {
        for code in [0_u16, 1002, 1005, 1006, 1015, 1016, 2999, 5000] {
            let (mut client, mut socket) = pair().await;
            client.write_all(&frame(0x88, &code.to_be_bytes())).await.unwrap();

            assert!(matches!(socket.next().await, Inbound::BadGoodbye), "{code}");
            socket.finish().await;

            assert_eq!(all_of(client).await[2..4], 1002_u16.to_be_bytes());
        }
    }

    #[tokio::test]
    async fn peer_that_vanishes_is_gone() {
        let (client, mut socket) = pair().await;
        drop(client);

        assert!(matches!(socket.next().await, Inbound::Gone));
    }

    #[tokio::test]
    async fn leftover_is_the_first_frame() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let server = listener.accept().await.unwrap().0;

        let mut socket = Socket::new(server.into(), &frame(0x81, b"hi"), Arc::new(LIMITS));

        let Inbound::Text(text) = socket.next().await else {
            panic!("no text");
        };
        assert_eq!(text.as_str(), "hi");
    }

    #[tokio::test]
    async fn peer_that_never_reads_is_slow() {
        let (_client, mut socket) = pair().await;

        let outcome = loop {
            let sent = socket.send(Outbound::Text("x".repeat(1000))).await;
            if sent.is_err() {
                break sent;
            }
        };

        assert_eq!(outcome, Err(SendError::Slow));
    }

    #[tokio::test]
    async fn peer_that_pings_and_never_reads_is_stopped_by_a_bound() {
        let (mut client, mut socket) = pair().await;
        let flood = tokio::spawn(async move {
            let pings = frame(0x89, &[b'x'; 125]).repeat(100);
            while client.write_all(&pings).await.is_ok() {}
        });

        let outcome = timeout(Duration::from_secs(20), async {
            loop {
                match socket.next().await {
                    Inbound::Control => {
                        if let Err(error) = socket.flush().await {
                            break Err(error);
                        }
                    }
                    other @ (Inbound::Text(_)
                    | Inbound::Binary(_)
                    | Inbound::Goodbye(_)
                    | Inbound::BadGoodbye
                    | Inbound::Broken(_)
                    | Inbound::Gone) => {
                        break Ok(format!("{other:?}"));
                    }
                }
            }
        })
        .await
        .unwrap();

        assert_eq!(outcome, Err(SendError::Slow));
        drop(socket);
        flood.await.unwrap();
    }
}
