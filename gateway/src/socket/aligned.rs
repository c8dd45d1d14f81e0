//! What lies between a WebSocket and its transport, so that an idle connection holds no buffer at all. Start with [`Aligned`].
//!
//! Bytes are read in large pieces into the stack, and handed on at most up to the end of a frame. What is left over is kept only until it is
//! handed on. So after each frame the library above holds nothing that it has not answered: between two messages its state, with the
//! buffers that they made, can be thrown away.

use std::{
    io::{self, Cursor, Read, Write},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::protocol::frame::{FrameHeader, coding::OpCode};

use crate::transport::Transport;

/// Bytes that are read at once.
const READ_LEN: usize = 8 * 1024;

/// What was read and not handed on yet, and where in the stream of frames that is.
#[derive(Debug, Default)]
pub(super) struct Unread {
    bytes: BytesMut,
    /// Bytes of the frame under way that were not handed on yet.
    left: u64,
    /// The last data frame was not the end of its message.
    is_within_message: bool,
}

impl Unread {
    /// `leftover` is what the peer has sent already.
    pub(super) fn new(leftover: &[u8]) -> Self {
        Self {
            bytes: BytesMut::from(leftover),
            ..Self::default()
        }
    }

    /// Everything that came was handed on, and is whole messages.
    pub(super) fn is_between_messages(&self) -> bool {
        self.bytes.is_empty() && self.left == 0 && !self.is_within_message
    }

    /// Reads what is there: how many bytes, 0 at the end of the stream.
    pub(super) fn poll_fill(&mut self, transport: &mut Transport, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut scratch = [const { MaybeUninit::uninit() }; READ_LEN];
        let mut read = ReadBuf::uninit(&mut scratch);
        ready!(Pin::new(transport).poll_read(cx, &mut read))?;
        self.bytes.extend_from_slice(read.filled());
        Poll::Ready(Ok(read.filled().len()))
    }

    /// Hands on what is there, and belongs to one frame. `None`: the next frame's header is not complete.
    fn hand_on(&mut self, buf: &mut [u8]) -> Option<usize> {
        if self.left == 0 {
            self.left = self.frame_len()?;
        }
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let len = self.bytes.len().min(left).min(buf.len());
        if len == 0 {
            return None;
        }
        self.bytes.copy_to_slice(&mut buf[..len]);
        self.left -= len as u64;
        if self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
        Some(len)
    }

    /// Length of the frame at the beginning of what is unread, header included.
    fn frame_len(&mut self) -> Option<u64> {
        let mut cursor = Cursor::new(&self.bytes[..]);
        match FrameHeader::parse(&mut cursor) {
            Ok(Some((header, payload_len))) => {
                if matches!(header.opcode, OpCode::Data(_)) {
                    self.is_within_message = !header.is_final;
                }
                Some(cursor.position().saturating_add(payload_len))
            }
            Ok(None) => None,
            // What is wrong with it is the library's to say.
            Err(_) => Some(u64::MAX),
        }
    }
}

/// A transport without blocking calls: what can't be done now is [`io::ErrorKind::WouldBlock`], and wakes the task of `cx` once it can.
pub(super) struct Aligned<'a, 'w> {
    pub(super) transport: &'a mut Transport,
    pub(super) unread: &'a mut Unread,
    pub(super) cx: &'a mut Context<'w>,
}

impl Read for Aligned<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(len) = self.unread.hand_on(buf) {
                return Ok(len);
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

impl Write for Aligned<'_, '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        unblocked(Pin::new(&mut *self.transport).poll_write(self.cx, buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        unblocked(Pin::new(&mut *self.transport).poll_flush(self.cx))
    }
}

fn unblocked<T>(polled: Poll<io::Result<T>>) -> io::Result<T> {
    match polled {
        Poll::Ready(done) => done,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}
