//! Messages to devices through the gateway's API, by a connection that stays open, so that its cost is that of the messages.

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use uuid::Uuid;

use crate::metrics::Ops;

/// Greatest answer.
const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// One connection to the API.
pub struct Sender {
    stream: TcpStream,
    host: String,
    token: String,
    read: Vec<u8>,
}

impl Sender {
    pub async fn connect(ops: &Ops) -> Result<Self> {
        let host = ops.url().trim_start_matches("http://").to_owned();
        let stream = TcpStream::connect(&host).await.context("connecting to the API")?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            host,
            token: ops.token().context("the gateway's API needs a token")?.to_owned(),
            read: Vec::new(),
        })
    }

    /// Sends one message, and waits until the API says that the device acknowledged it.
    pub async fn send(&mut self, device: Uuid) -> Result<()> {
        let body = r#"{"payload":{"n":1}}"#;
        let request = format!(
            "POST /api/v1/devices/{device}/messages HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.host,
            self.token,
            body.len()
        );
        self.stream.write_all(request.as_bytes()).await?;
        self.read.clear();
        loop {
            ensure!(self.read.len() < ANSWER_BYTES_MAX, "an answer without an end");
            ensure!(
                self.stream.read_buf(&mut self.read).await? > 0,
                "the API closed the connection"
            );
            if let Some(status) = status(&self.read)? {
                ensure!(
                    status == 200,
                    "a message was not acknowledged: {}",
                    String::from_utf8_lossy(&self.read)
                );
                return Ok(());
            }
        }
    }
}

/// The status of an answer that is complete.
fn status(answer: &[u8]) -> Result<Option<u16>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head_len) = response.parse(answer).context("reading the API's answer")? else {
        return Ok(None);
    };
    let body_len: usize = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok())
        .context("an answer of the API without a length")?;
    Ok((answer.len() >= head_len + body_len).then_some(response.code).flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_once_its_body_is_there() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";

        assert_eq!(status(answer).unwrap(), Some(200));
        assert_eq!(status(&answer[..answer.len() - 1]).unwrap(), None);
        assert_eq!(status(&answer[..20]).unwrap(), None);
    }
}
