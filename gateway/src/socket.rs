//! A device's WebSocket, behind one type of our own: what comes in, what goes out, and how it ends.
//!
//! The library's types stop here, so that what is under them (its buffers, its frames) can change without the session
//! noticing. Start with [`Socket`]. Buffers are small and bounded, and an idle socket has given back what a large message took.

mod aligned;

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use seawall_proto::close::Close;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tokio_tungstenite::tungstenite::{
    Error, Message, Utf8Bytes,
    error::CapacityError,
    protocol::{CloseFrame, Role, WebSocketConfig, WebSocketContext, frame::coding::CloseCode},
};

use self::aligned::Aligned;

use crate::transport::Transport;

/// The library's read buffer is made at once and stays: with its default it would be 128 KiB. A heartbeat fits; what does not is
/// copied in pieces of this size, which costs no system call, since [`Aligned`] reads by the large piece.
const READ_BUFFER_LEN: usize = 64;

/// A socket that took or sent a frame of over this many bytes gets new buffers once it is idle.
const KEPT_LEN_MAX: usize = 1024;

/// Frames said together go out in one write up to this many bytes.
const WRITE_BUFFER_LEN: usize = 4 * 1024;

/// Room for what a frame has around its payload.
const ENVELOPE_LEN: usize = 1024;

/// Time for the peer to answer our close frame. One that does not is dropped. Less than the 2 s that a process has for its end.
pub const CLOSE_TIMEOUT: Duration = Duration::from_millis(1500);

/// What is still read from a peer after its connection was given up, so that a reset does not destroy the close frame.
const DRAIN_LEN_MAX: usize = 64 * 1024;

/// Bounds of one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketLimits {
    /// Largest frame taken, in bytes; then 1009.
    pub frame_len_max: usize,
    /// Largest message taken or sent, in bytes; then 1009.
    pub message_len_max: usize,
    /// Longest time a write may take; then the peer does not read, and is dropped.
    pub write_timeout: Duration,
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
    /// The peer said goodbye; finish with [`Socket::finish`].
    Goodbye,
    /// The same because the protocol was broken: by us, as the peer says, or by its own goodbye, whose code must not be sent. Either
    /// way it has been answered 1002.
    BadGoodbye,
    /// The peer broke the protocol: close with this, and [`Socket::fail`].
    Broken(Close),
    /// The connection is gone, without a word.
    Gone,
}

/// Why nothing more can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    #[error("the peer does not read")]
    Slow,
    #[error("the connection is gone")]
    Gone,
}

/// An upgraded connection.
#[derive(Debug)]
pub struct Socket {
    io: Aligned,
    context: WebSocketContext,
    write_timeout: Duration,
    /// Reading has come to its end.
    has_ended: bool,
    /// The transport takes no more for now: what is in the write buffer goes first.
    is_blocked: bool,
    /// It sent a large frame.
    has_grown: bool,
}

impl Socket {
    /// Takes over a connection behind its 101. `leftover` is what the peer sent without waiting for it.
    #[must_use]
    pub fn new(transport: Transport, leftover: Vec<u8>, limits: SocketLimits) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_LEN)
            .write_buffer_size(WRITE_BUFFER_LEN)
            // Pings are answered into this buffer: without a bound a peer that pings and never reads would fill the memory.
            .max_write_buffer_size(WRITE_BUFFER_LEN + 2 * (limits.message_len_max + ENVELOPE_LEN))
            .max_frame_size(Some(limits.frame_len_max))
            .max_message_size(Some(limits.message_len_max));
        Self {
            io: Aligned::new(transport, leftover),
            context: WebSocketContext::new(Role::Server, Some(config)),
            write_timeout: limits.write_timeout,
            has_ended: false,
            is_blocked: false,
            has_grown: false,
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
            Some(Ok(Message::Close(_))) => Inbound::Goodbye,
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

    /// Puts a text frame into the write buffer.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    pub async fn feed_text(&mut self, text: String) -> Result<(), SendError> {
        self.feed(Message::Text(text.into())).await
    }

    /// Puts a binary frame into the write buffer.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    pub async fn feed_binary(&mut self, bytes: Vec<u8>) -> Result<(), SendError> {
        self.feed(Message::Binary(bytes.into())).await
    }

    /// Puts a ping into the write buffer.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    pub async fn feed_ping(&mut self) -> Result<(), SendError> {
        self.feed(Message::Ping(Bytes::new())).await
    }

    /// Writes what was fed.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    ///
    /// # Cancel safety
    /// Safe: what was not written stays in the buffer.
    pub async fn flush(&mut self) -> Result<(), SendError> {
        in_time(self.write_timeout, poll_fn(|cx| self.poll_flush(cx))).await
    }

    /// Sends a close frame, and waits a moment for the peer's.
    pub async fn close(mut self, close: &Close) {
        if self.send_close(close).await.is_ok() {
            self.finish().await;
        }
    }

    /// Answers the peer's close frame, which the library does while it reads, and ends the connection.
    pub async fn finish(mut self) {
        let last_words = async {
            while poll_fn(|cx| self.poll_message(cx))
                .await
                .is_some_and(|message| message.is_ok())
            {}
            self.io.transport().say_goodbye().await;
        };
        // Whether the peer answers or not, the connection ends here.
        let _ = timeout(CLOSE_TIMEOUT, last_words).await;
    }

    /// Sends a close frame to a peer whose frames can't be read any further (RFC 6455 §7.1.7).
    pub async fn fail(mut self, close: &Close) {
        if self.send_close(close).await.is_ok() {
            drain(self.io.transport(), DRAIN_LEN_MAX, CLOSE_TIMEOUT).await;
        }
    }

    async fn send_close(&mut self, close: &Close) -> Result<(), SendError> {
        let frame = CloseFrame {
            code: CloseCode::from(close.code()),
            reason: close.reason().into(),
        };
        in_time(self.write_timeout.min(CLOSE_TIMEOUT), async {
            self.write(Message::Close(Some(frame))).await?;
            poll_fn(|cx| self.poll_flush(cx)).await
        })
        .await
    }

    async fn feed(&mut self, message: Message) -> Result<(), SendError> {
        in_time(self.write_timeout, self.write(message)).await
    }

    /// Puts a message into the write buffer, once the transport took what was too much for it.
    async fn write(&mut self, message: Message) -> Result<(), Error> {
        if self.is_blocked {
            poll_fn(|cx| self.poll_flush(cx)).await?;
        }
        self.has_grown |= message.len() > KEPT_LEN_MAX;
        let written = unblocked(self.context.write(&mut self.io, message));
        self.is_blocked = written.is_pending();
        match written {
            Poll::Ready(done) => done,
            // It is in the buffer.
            Poll::Pending => Ok(()),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.io.wake(cx);
        let flushed = ready!(unblocked(self.context.flush(&mut self.io)));
        self.is_blocked = false;
        Poll::Ready(match flushed {
            // The close frame was the last thing to write.
            Err(Error::ConnectionClosed) => Ok(()),
            other => other,
        })
    }

    /// `None` where nothing more comes.
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, Error>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        self.io.wake(cx);
        let Poll::Ready(read) = unblocked(self.context.read(&mut self.io)) else {
            self.shrink();
            return Poll::Pending;
        };
        self.has_ended = read.is_err();
        Poll::Ready(match read {
            Err(Error::ConnectionClosed | Error::AlreadyClosed) => None,
            read => Some(read),
        })
    }

    /// Gives back the buffers that a large message made: the library keeps them for as long as it has its state. Between two messages, and
    /// with nothing left to write, there is nothing in that state.
    fn shrink(&mut self) {
        let is_large = self.has_grown || self.io.largest() > KEPT_LEN_MAX as u64;
        if is_large
            && self.io.is_between_messages()
            && self.context.can_write()
            && matches!(self.context.flush(&mut self.io), Ok(()))
        {
            self.context = WebSocketContext::new(Role::Server, Some(*self.context.get_config()));
            self.has_grown = false;
            self.io.forget();
        }
    }
}

/// What the library could not do for now is pending.
fn unblocked<T>(done: Result<T, Error>) -> Poll<Result<T, Error>> {
    match done {
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        done => Poll::Ready(done),
    }
}

async fn in_time(limit: Duration, sent: impl Future<Output = Result<(), Error>>) -> Result<(), SendError> {
    match timeout(limit, sent).await {
        Ok(Ok(())) => Ok(()),
        // The write buffer is full of answers to pings that the peer does not read.
        Ok(Err(Error::WriteBufferFull(_))) | Err(_) => Err(SendError::Slow),
        Ok(Err(_)) => Err(SendError::Gone),
    }
}

/// The close that answers an error in reading; `None` where nobody is left to read it.
fn broken_by(error: &Error) -> Option<Close> {
    match error {
        Error::Capacity(CapacityError::MessageTooLong { .. } | CapacityError::TooManyHeaders) => Some(Close::TooBig),
        Error::Utf8(_) => Some(Close::NotUtf8),
        Error::Protocol(error) if !is_loss(error) => Some(Close::Protocol),
        Error::WriteBufferFull(_) | Error::AttackAttempt => Some(Close::Policy),
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
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const LIMITS: SocketLimits = SocketLimits {
        frame_len_max: 1000,
        message_len_max: 1000,
        write_timeout: Duration::from_millis(300),
    };

    async fn pair() -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let server = listener.accept().await.unwrap().0;
        (client, Socket::new(server.into(), Vec::new(), LIMITS))
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
    async fn goodbye_is_answered() {
        let (mut client, mut socket) = pair().await;
        client.write_all(&frame(0x88, &1000_u16.to_be_bytes())).await.unwrap();

        assert!(matches!(socket.next().await, Inbound::Goodbye));
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

        let mut socket = Socket::new(server.into(), frame(0x81, b"hi"), LIMITS);

        let Inbound::Text(text) = socket.next().await else {
            panic!("no text");
        };
        assert_eq!(text.as_str(), "hi");
    }

    #[tokio::test]
    async fn peer_that_never_reads_is_slow() {
        let (_client, mut socket) = pair().await;

        let outcome = loop {
            let fed = socket.feed_text("x".repeat(1000)).await;
            let sent = if fed.is_ok() { socket.flush().await } else { fed };
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
                    | Inbound::Goodbye
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
