//! What lies between a WebSocket and its transport, so that an idle connection holds no read buffer. Start with [`Aligned`].
//!
//! Bytes are read in large pieces into the stack, and handed on at most up to the end of a frame. What is left over is kept only until it is
//! handed on. So the library under the WebSocket needs no more than a few bytes of buffer of its own, and after each frame it holds
//! nothing that it has not answered: its state can be thrown away between two messages, with the buffers that a large one made.

use std::{
    io::{self, Cursor, Read, Write},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::protocol::frame::{FrameHeader, coding::OpCode};

use crate::transport::Transport;

/// Bytes that are read at once.
const READ_LEN: usize = 8 * 1024;

/// A transport without blocking calls: what can't be done now is [`io::ErrorKind::WouldBlock`], and wakes the task of
/// [`wake`](Self::wake) once it can.
#[derive(Debug)]
pub(super) struct Aligned {
    transport: Transport,
    /// Read, and not handed on yet.
    unread: BytesMut,
    /// Bytes of the frame under way that were not handed on yet.
    left: u64,
    /// The last data frame was not the end of its message.
    is_within_message: bool,
    /// The largest frame since [`forget`](Self::forget).
    largest: u64,
    waker: Option<Waker>,
}

impl Aligned {
    /// `leftover` is what the peer has sent already.
    pub(super) fn new(transport: Transport, leftover: Vec<u8>) -> Self {
        Self {
            transport,
            unread: BytesMut::from(leftover.as_slice()),
            left: 0,
            is_within_message: false,
            largest: 0,
            waker: None,
        }
    }

    pub(super) const fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    /// Whose task goes on when the transport does.
    pub(super) fn wake(&mut self, cx: &Context<'_>) {
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
    }

    /// Everything that was handed on is whole messages.
    pub(super) const fn is_between_messages(&self) -> bool {
        self.left == 0 && !self.is_within_message
    }

    /// The largest frame that was handed on, in bytes, as far as it is not [forgotten](Self::forget).
    pub(super) const fn largest(&self) -> u64 {
        self.largest
    }

    pub(super) const fn forget(&mut self) {
        self.largest = 0;
    }

    /// Hands on what is there, and belongs to one frame. `None`: the next frame's header is not complete.
    fn hand_on(&mut self, buf: &mut [u8]) -> Option<usize> {
        if self.left == 0 {
            self.left = self.frame_len()?;
            self.largest = self.largest.max(self.left);
        }
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let len = self.unread.len().min(left).min(buf.len());
        if len == 0 {
            return None;
        }
        self.unread.copy_to_slice(&mut buf[..len]);
        self.left -= len as u64;
        if self.unread.is_empty() {
            self.unread = BytesMut::new();
        }
        Some(len)
    }

    /// Length of the frame at the beginning of what is unread, header included.
    fn frame_len(&mut self) -> Option<u64> {
        let mut cursor = Cursor::new(&self.unread[..]);
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

    fn poll<T>(
        &mut self,
        step: impl FnOnce(Pin<&mut Transport>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> io::Result<T> {
        let waker = self.waker.as_ref().unwrap_or(Waker::noop());
        match step(Pin::new(&mut self.transport), &mut Context::from_waker(waker)) {
            Poll::Ready(done) => done,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Read for Aligned {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(len) = self.hand_on(buf) {
                return Ok(len);
            }
            let mut scratch = [const { MaybeUninit::uninit() }; READ_LEN];
            let mut read = ReadBuf::uninit(&mut scratch);
            self.poll(|transport, cx| transport.poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                // The peer has ended within a header.
                let len = self.unread.len().min(buf.len());
                self.unread.copy_to_slice(&mut buf[..len]);
                return Ok(len);
            }
            self.unread.extend_from_slice(read.filled());
        }
    }
}

impl Write for Aligned {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.poll(|transport, cx| transport.poll_write(cx, buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.poll(|transport, cx| transport.poll_flush(cx))
    }
}
