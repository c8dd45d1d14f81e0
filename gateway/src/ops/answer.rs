//! The bodies of answers while they are written. Their memory is bounded, and so is the time that a caller has to read
//! one.
//!
//! A long answer stays in memory until its caller has read it. Without a bound, slow callers would fill the memory with
//! lists, and devices would be refused for it. Start with [`Share`].

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};
use tokio_util::task::AbortOnDropHandle;

use super::permits::Permit;

/// Maximum size of all long answers that are not written yet, in bytes. A greater one is allowed alone.
pub const ANSWERS_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Maximum length of a piece that is passed to the connection at once, in bytes. An answer is long if it has more than
/// one piece.
const PIECE_LEN: usize = 16 * 1024;
/// Maximum time for a caller to read a long answer. Then its connection is closed.
pub const READ_MAX: Duration = Duration::from_mins(1);

/// One answer's permit for memory, and its deadline.
#[derive(Debug)]
pub struct Share {
    _permit: OwnedSemaphorePermit,
    /// Ends the connection at the deadline.
    _timer: Option<AbortOnDropHandle<()>>,
}

/// The answers that are being written take all the memory for answers.
#[derive(Debug, PartialEq, Eq)]
pub struct NoRoom;

impl Share {
    /// Acquires memory for this body. `None` for a short body, and for a stream, which bounds itself. The
    /// `connection` is closed if the body is not read within `read_max`.
    ///
    /// # Errors
    /// There is not enough memory for it now.
    pub fn of(
        answers: &Arc<Semaphore>,
        body: &Body,
        connection: Option<&Arc<Permit>>,
        read_max: Duration,
    ) -> Result<Option<Self>, NoRoom> {
        let len = body.size_hint().exact().unwrap_or_default();
        if len <= PIECE_LEN as u64 {
            return Ok(None);
        }
        let permits = usize::try_from(len).unwrap_or(usize::MAX).min(ANSWERS_BYTES_MAX);
        let permits = u32::try_from(permits).unwrap_or(u32::MAX);
        let permit = Arc::clone(answers)
            .try_acquire_many_owned(permits)
            .map_err(|_| NoRoom)?;
        let timer = connection.map(|connection| {
            let connection = Arc::downgrade(connection);
            AbortOnDropHandle::new(tokio::spawn(async move {
                sleep(read_max).await;
                if let Some(connection) = connection.upgrade() {
                    connection.evict();
                }
            }))
        });
        Ok(Some(Self {
            _permit: permit,
            _timer: timer,
        }))
    }
}

/// A body, with what its request holds until it is written.
///
/// Its pieces are copies, so that all of its memory is free once the last piece was taken.
pub struct Held<T> {
    body: Body,
    /// The rest of the current frame.
    rest: Bytes,
    _holds: T,
}

impl<T> Held<T> {
    pub fn new(body: Body, holds: T) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            _holds: holds,
        }
    }
}

impl<T: Unpin> HttpBody for Held<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                end => return Poll::Ready(end),
            };
            match frame.into_data() {
                Ok(data) if data.len() > PIECE_LEN => self.rest = data,
                Ok(data) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Err(other) => return Poll::Ready(Some(Ok(other))),
            }
        }
        let len = self.rest.len().min(PIECE_LEN);
        let piece = Bytes::copy_from_slice(&self.rest.split_to(len));
        if self.rest.is_empty() {
            // An empty rest of a buffer still holds the buffer.
            self.rest = Bytes::new();
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (inner, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower().saturating_add(rest));
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::timeout;

    use super::{super::permits::Permits, *};

    fn answers() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(ANSWERS_BYTES_MAX))
    }

    #[tokio::test]
    async fn long_answer_is_handed_on_whole_in_pieces_and_its_length_is_known_throughout() {
        let text: Vec<u8> = (0..50_000_u32).map(|at| (at % 251).to_le_bytes()[0]).collect();
        let mut held = Held::new(Body::from(text.clone()), ());
        let mut read = Vec::new();

        while !held.is_end_stream() {
            assert_eq!(held.size_hint().exact(), Some((text.len() - read.len()) as u64));
            let frame = poll_fn(|cx| Pin::new(&mut held).poll_frame(cx)).await.unwrap().unwrap();
            let piece = frame.into_data().unwrap();
            assert!(piece.len() <= PIECE_LEN);
            read.extend_from_slice(&piece);
        }

        assert!(read == text);
        assert_eq!(held.size_hint().exact(), Some(0));
    }

    #[test]
    fn long_answers_have_room_up_to_a_sum_and_short_ones_always() {
        let answers = answers();
        let long = Body::from(vec![0; ANSWERS_BYTES_MAX / 2]);
        let share = |body: &Body| Share::of(&answers, body, None, READ_MAX);

        let first = share(&long).unwrap();
        let second = share(&long).unwrap();

        assert!(matches!(share(&long), Err(NoRoom)));
        assert!(matches!(share(&Body::from(vec![0; PIECE_LEN])), Ok(None)));
        assert!(matches!(share(&Body::from(vec![0; PIECE_LEN + 1])), Err(NoRoom)));
        drop((first, second));
        assert!(share(&Body::from(vec![0; 2 * ANSWERS_BYTES_MAX])).unwrap().is_some());
    }

    #[tokio::test]
    async fn connection_ends_where_a_long_answer_is_not_read_in_time() {
        let permit = Arc::new(Permits::new(8).acquire().await);
        let long = Body::from(vec![0; PIECE_LEN + 1]);
        let share = || Share::of(&answers(), &long, Some(&permit), Duration::ZERO).unwrap();
        let is_evicted = async |limit| timeout(limit, permit.evicted()).await.is_ok();

        drop(share());
        assert!(!is_evicted(Duration::from_millis(50)).await, "it was read");

        let unread = share();
        assert!(is_evicted(Duration::from_secs(10)).await);
        drop(unread);
    }
}
