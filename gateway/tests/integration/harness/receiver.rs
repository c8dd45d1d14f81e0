//! An HTTP receiver of webhooks, on a separate thread.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use seawall_proto::webhook::Secret;
use serde_json::Value;

/// Secret that messages are signed with.
pub const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A request that arrived.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

/// The receiver. Its thread ends with the process.
pub struct Receiver {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    requests: Vec<Request>,
    /// Answers to the next requests. Then 204.
    answers: VecDeque<&'static str>,
}

impl Receiver {
    /// Gives these answers in order (such as `500 Internal Server Error`), and 204 after them.
    pub fn start(answers: &[&'static str]) -> Self {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), answers)
    }

    pub fn start_on(address: SocketAddr, answers: &[&'static str]) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State {
            answers: answers.iter().copied().collect(),
            ..State::default()
        }));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    // A sender that leaves is not a failure of the receiver.
                    let _ = serve(&stream, &shared);
                });
            }
        });
        Self { address, state }
    }

    pub fn requests(&self) -> Vec<Request> {
        lock(&self.state).requests.clone()
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(stream: &TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(());
        }
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let length = headers.get("content-length").and_then(|text| text.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        reader.read_exact(&mut body)?;
        let body = String::from_utf8_lossy(&body).into_owned();
        let answer = {
            let mut state = lock(state);
            state.requests.push(Request { path, headers, body });
            state.answers.pop_front().unwrap_or("204 No Content")
        };
        let mut stream = *reader.get_ref();
        write!(stream, "HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n")?;
        stream.flush()?;
    }
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// The message. Its signature must be valid.
    #[track_caller]
    pub fn verified(&self) -> Value {
        let seconds: u64 = self.header("webhook-timestamp").parse().unwrap();
        let expected = Secret::parse(SECRET)
            .unwrap()
            .sign(self.header("webhook-id"), seconds, &self.body);
        assert_eq!(self.header("webhook-signature"), expected, "{self:?}");
        assert_eq!(self.header("content-type"), "application/json");
        serde_json::from_str(&self.body).unwrap()
    }
}
