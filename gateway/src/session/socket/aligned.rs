//! What lies between a WebSocket and its transport, so that an idle connection holds no buffer at all. Start with [`Aligned`].
//!
//! Bytes are read in large pieces into the stack, and handed on at most up to the end of a frame. The rest is kept only until it is
//! handed on. So after each frame the library above holds nothing that it has not answered: between two messages its state, with the
//! buffers that they made, can be thrown away.

use std::{
    io::{self, Cursor, Read, Write},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};
use tokio_tungstenite::tungstenite::protocol::frame::{FrameHeader, coding::OpCode};

use crate::edge::transport::Transport;

/// Bytes that are read at once.
const READ_LEN: usize = 8 * 1024;

/// Maximum number of empty fragments of one message. The library joins fragments without coming back, so that empty ones without end
/// would keep a core busy. The others are bounded by the size of a message.
pub(super) const EMPTY_FRAGMENTS_MAX: u32 = 4_096;

/// What one gap between two frames counts at most towards the time of a message: a process that was stopped, or a
/// machine that was suspended, is not the peer's doing.
const GAP_MAX: Duration = Duration::from_secs(30);

/// Bytes read and not handed on yet, and where in the stream of frames that is.
#[derive(Debug, Default)]
pub(super) struct Unread {
    bytes: BytesMut,
    /// Bytes of the frame under way that were not handed on yet.
    left: u64,
    /// Of the message under way: its last data frame was not its end.
    message: Option<Fragments>,
    /// Fragments of messages that are complete, until they are taken.
    complete_len: u32,
}

/// Writes a control frame without payload to a peer to which nothing else is under way. False: not a byte of it went
/// out, and the frame is to be written as any other.
pub(super) fn write_lone(transport: &mut Transport, first: u8, cx: &mut Context<'_>) -> Lone {
    // TLS has a buffer of its own, which would have to be flushed.
    if !matches!(transport, Transport::Plain(_)) {
        return Lone::Untouched;
    }
    match Pin::new(transport).poll_write(cx, &[first, EMPTY]) {
        Poll::Ready(Ok(2)) => Lone::Written,
        Poll::Ready(Ok(1)) => Lone::Half,
        // The connection is gone, which shows at the next try; or the kernel has no room.
        Poll::Ready(Ok(_) | Err(_)) | Poll::Pending => Lone::Untouched,
    }
}

/// How far a lone control frame went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lone {
    Written,
    /// Its second byte is to go first of all that follows.
    Half,
    Untouched,
}

/// What came of a message that is not complete.
#[derive(Debug, Clone, Copy)]
struct Fragments {
    len: u32,
    empty_len: u32,
    /// From its first frame to the latest one that came, each gap up to [`GAP_MAX`].
    lasted: Duration,
    latest_at: Instant,
}

/// First byte of a ping and of a pong that are whole frames (RFC 6455 §5.2).
pub(super) const PING: u8 = 0x89;
pub(super) const PONG: u8 = 0x8a;
/// Second byte of a client's frame without payload; the key of its mask follows.
const EMPTY_MASKED: u8 = 0x80;
/// Second byte of our frames without payload.
pub(super) const EMPTY: u8 = 0;

/// Result of a read while nothing else was under way.
#[derive(Debug)]
pub(super) enum First {
    /// The stream has ended.
    End,
    /// One ping without payload, and no more.
    Ping,
    /// One pong without payload, and no more.
    Pong,
    Other(Unread),
}

/// A message has too many frames, or takes too long.
#[derive(Debug, thiserror::Error)]
#[error("a message in too many frames, or for too long")]
pub(super) struct Overlong;

impl Unread {
    /// `leftover` is what the peer has sent already.
    pub(super) fn new(leftover: &[u8]) -> Self {
        Self {
            bytes: BytesMut::from(leftover),
            ..Self::default()
        }
    }

    /// Number of fragments of the messages that were completed since the last call.
    pub(super) fn take_fragments(&mut self) -> u32 {
        std::mem::take(&mut self.complete_len)
    }

    /// Everything that came was handed on, and is whole messages.
    pub(super) fn is_between_messages(&self) -> bool {
        self.bytes.is_empty() && self.left == 0 && self.message.is_none()
    }

    /// Reads what is there: how many bytes, 0 at the end of the stream.
    pub(super) fn poll_fill(&mut self, transport: &mut Transport, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut scratch = [const { MaybeUninit::uninit() }; READ_LEN];
        let mut read = ReadBuf::uninit(&mut scratch);
        ready!(Pin::new(transport).poll_read(cx, &mut read))?;
        self.bytes.extend_from_slice(read.filled());
        Poll::Ready(Ok(read.filled().len()))
    }

    /// Reads what is there between two messages. A lone pong is most of what idle devices send: it needs no buffer.
    pub(super) fn poll_first(transport: &mut Transport, cx: &mut Context<'_>) -> Poll<io::Result<First>> {
        let mut scratch = [const { MaybeUninit::uninit() }; READ_LEN];
        let mut read = ReadBuf::uninit(&mut scratch);
        ready!(Pin::new(transport).poll_read(cx, &mut read))?;
        let first = match read.filled() {
            [] => First::End,
            [PONG, EMPTY_MASKED, _, _, _, _] => First::Pong,
            [PING, EMPTY_MASKED, _, _, _, _] => First::Ping,
            bytes => First::Other(Self::new(bytes)),
        };
        Poll::Ready(Ok(first))
    }

    /// Hands on what is there, and belongs to one frame. `None`: the next frame's header is not complete.
    fn hand_on(&mut self, buf: &mut [u8], message_time_max: Duration) -> Result<Option<usize>, Overlong> {
        if self.left == 0 {
            let Some(len) = self.frame_len(message_time_max)? else {
                return Ok(None);
            };
            self.left = len;
        }
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let len = self.bytes.len().min(left).min(buf.len());
        if len == 0 {
            return Ok(None);
        }
        self.bytes.copy_to_slice(&mut buf[..len]);
        self.left -= len as u64;
        if self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
        Ok(Some(len))
    }

    /// Length of the frame at the beginning of what is unread, header included.
    fn frame_len(&mut self, message_time_max: Duration) -> Result<Option<u64>, Overlong> {
        let mut cursor = Cursor::new(&self.bytes[..]);
        match FrameHeader::parse(&mut cursor) {
            Ok(Some((header, payload_len))) => {
                let len = cursor.position().saturating_add(payload_len);
                if matches!(header.opcode, OpCode::Data(_)) {
                    self.note_fragment(payload_len == 0, header.is_final);
                }
                self.check_message(message_time_max)?;
                Ok(Some(len))
            }
            Ok(None) => Ok(None),
            // The library reports the fault.
            Err(_) => Ok(Some(u64::MAX)),
        }
    }

    /// A data frame begins: a whole message, or a fragment of one.
    fn note_fragment(&mut self, is_empty: bool, is_final: bool) {
        if is_final {
            let before = self.message.take().map_or(0, |message| message.len);
            self.complete_len = self.complete_len.saturating_add(before).saturating_add(1);
            return;
        }
        let message = self.message.get_or_insert_with(|| Fragments {
            len: 0,
            empty_len: 0,
            lasted: Duration::ZERO,
            latest_at: Instant::now(),
        });
        message.len = message.len.saturating_add(1);
        message.empty_len += u32::from(is_empty);
    }

    /// Whether the message under way keeps its bounds, at each frame: pings and pongs may come between its fragments.
    fn check_message(&mut self, message_time_max: Duration) -> Result<(), Overlong> {
        let Some(message) = &mut self.message else {
            return Ok(());
        };
        let now = Instant::now();
        message.lasted += (now - message.latest_at).min(GAP_MAX);
        message.latest_at = now;
        if message.empty_len > EMPTY_FRAGMENTS_MAX || message.lasted > message_time_max {
            return Err(Overlong);
        }
        Ok(())
    }
}

/// A transport without blocking calls: what can't be done now is [`io::ErrorKind::WouldBlock`], and wakes the task of `cx` once it can.
pub(super) struct Aligned<'a, 'w> {
    pub(super) transport: &'a mut Transport,
    pub(super) unread: &'a mut Unread,
    /// Bytes that the transport has taken. Wraps.
    pub(super) written: &'a mut u64,
    /// The second byte of a control frame whose first one went out alone.
    pub(super) half_sent: &'a mut bool,
    pub(super) cx: &'a mut Context<'w>,
    /// Longest time from the first to the last frame of a message.
    pub(super) message_time_max: Duration,
}

impl Read for Aligned<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.unread.hand_on(buf, self.message_time_max) {
                Ok(Some(len)) => return Ok(len),
                Ok(None) => {}
                Err(overlong) => return Err(io::Error::new(io::ErrorKind::InvalidData, overlong)),
            }
            if unblocked(self.unread.poll_fill(self.transport, self.cx))? == 0 {
                // The peer has ended within a header.
                let len = self.unread.bytes.len().min(buf.len());
                self.unread.bytes.copy_to_slice(&mut buf[..len]);
                return Ok(len);
            }
        }
    }
}

impl Aligned<'_, '_> {
    fn send_half(&mut self) -> io::Result<()> {
        if *self.half_sent {
            let len = unblocked(Pin::new(&mut *self.transport).poll_write(self.cx, &[EMPTY]))?;
            *self.half_sent = len == 0;
        }
        Ok(())
    }
}

impl Write for Aligned<'_, '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.send_half()?;
        let len = unblocked(Pin::new(&mut *self.transport).poll_write(self.cx, buf))?;
        *self.written = self.written.wrapping_add(len as u64);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_half()?;
        unblocked(Pin::new(&mut *self.transport).poll_flush(self.cx))
    }
}

fn unblocked<T>(polled: Poll<io::Result<T>>) -> io::Result<T> {
    match polled {
        Poll::Ready(done) => done,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME_MAX: Duration = Duration::from_secs(120);
    /// The first part of a text, and parts of it that follow.
    const FIRST: [u8; 7] = [0x01, 0x81, 0, 0, 0, 0, b'x'];
    const NEXT: [u8; 7] = [0x00, 0x81, 0, 0, 0, 0, b'x'];

    /// As if so much time had passed.
    fn wait(unread: &mut Unread, span: Duration) {
        let message = unread.message.as_mut().unwrap();
        message.latest_at = message.latest_at.checked_sub(span).unwrap();
    }

    fn take(unread: &mut Unread, frame: &[u8]) -> Result<(), Overlong> {
        unread.bytes.extend_from_slice(frame);
        while unread.hand_on(&mut [0; 64], TIME_MAX)?.is_some() {}
        Ok(())
    }

    #[test]
    fn process_that_was_stopped_breaks_no_message() {
        let mut unread = Unread::default();
        take(&mut unread, &FIRST).unwrap();

        wait(&mut unread, Duration::from_secs(600));

        assert!(take(&mut unread, &NEXT).is_ok());
    }

    #[test]
    fn message_whose_parts_come_too_slowly_is_overlong() {
        let mut unread = Unread::default();
        take(&mut unread, &FIRST).unwrap();

        let mut took = Duration::ZERO;
        while take(&mut unread, &NEXT).is_ok() {
            wait(&mut unread, Duration::from_secs(10));
            took += Duration::from_secs(10);
            assert!(took <= 2 * TIME_MAX, "nothing ends it");
        }

        assert!(took >= TIME_MAX, "{took:?}");
    }
}
