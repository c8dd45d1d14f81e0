//! A device's life: wait, attempt, session, and again. The attempt and the session live in boxes of their own, so that a
//! waiting device is small, and an idle session does not keep the room of its handshake.

use std::{future::pending, sync::Arc, time::Duration};

use rand::rngs::SmallRng;
use seawall_proto::{id::DeviceId, time::Instant};
use tokio::time::sleep_until;

use super::{
    Context, Event, SUBPROTOCOL,
    commands::{Absence, Commands},
};
use crate::{
    device::{Action, Device, State},
    handshake::{Credential, Hello, OpenError, Socket, SocketOptions, open, upgrade},
};

pub(super) struct DeviceTask {
    pub(super) context: Arc<Context>,
    pub(super) commands: Arc<Commands>,
    pub(super) device: Device,
    pub(super) rng: SmallRng,
    pub(super) number: usize,
    pub(super) id: DeviceId,
    pub(super) external_id: Option<Arc<str>>,
    pub(super) credential: Credential,
    pub(super) tenant: Option<Arc<str>>,
    pub(super) model: Option<Arc<str>>,
    pub(super) firmware: Option<Arc<str>>,
    pub(super) socket: SocketOptions,
    pub(super) messages_every: Option<Duration>,
    pub(super) resumes: bool,
    /// Its power is cut, or it has to say goodbye to its session.
    pub(super) absence: Option<Absence>,
    pub(super) is_ending: bool,
}

impl DeviceTask {
    pub(super) async fn live(mut self: Box<Self>) {
        while let Some(intended) = self.wait().await {
            self.report(Event::Attempt { intended });
            if let Some(socket) = Box::pin(self.attempt()).await {
                self.report(Event::Connected);
                Box::pin(self.session(socket)).await;
            }
        }
    }

    /// Until the device wants to connect; tells since when. `None`: it is over.
    async fn wait(&mut self) -> Option<Instant> {
        while !self.is_ending {
            let due = self.device.poll_timeout();
            tokio::select! {
                () = self.until(due) => self.device.handle_timeout(self.context.now(), &mut self.rng),
                () = self.commands.given() => self.obey(),
            }
            if let Some(Action::Connect) = self.device.poll_action() {
                return due;
            }
        }
        None
    }

    /// From the first SYN to the gateway's answer. `None`: the device has gone back to waiting.
    async fn attempt(&mut self) -> Option<Box<Socket>> {
        let context = Arc::clone(&self.context);
        let opened = self.unless_over(open(&context.target, self.socket)).await?;
        self.device.handle_opened(context.now());
        let request = self.hello().request(&context.target);
        let answer = self.unless_over(async { upgrade(opened?, request?).await }).await?;
        self.answered(answer.map(|(socket, _)| socket))
    }

    /// A part of the attempt. `None`: the attempt is over before it is done.
    async fn unless_over<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        while self.device.state() == State::Connecting && !self.is_ending {
            let deadline = self.device.poll_timeout();
            tokio::select! {
                done = &mut work => return Some(done),
                () = self.until(deadline) => self.device.handle_timeout(self.context.now(), &mut self.rng),
                () = self.commands.given() => self.obey(),
            }
        }
        // `Abort` asks for what the end of the attempt does: its socket goes with it.
        self.device.poll_action();
        self.report(Event::Failed { is_local: false });
        None
    }

    fn answered(&mut self, answer: Result<Socket, OpenError>) -> Option<Box<Socket>> {
        let now = self.context.now();
        match answer {
            Ok(socket) => {
                self.device.handle_connected(now, &mut self.rng);
                Some(Box::new(socket))
            }
            Err(OpenError::Refused(refused)) => {
                self.device.handle_refused(refused.hint(), now, &mut self.rng);
                self.report(Event::Refused(&refused));
                None
            }
            Err(error) => {
                tracing::trace!(device.id = %self.id, %error, "attempt failed");
                self.device.handle_failed(now, &mut self.rng);
                self.report(Event::Failed {
                    is_local: error.is_local(),
                });
                None
            }
        }
    }

    fn hello(&self) -> Hello<'_> {
        Hello {
            device: self.id,
            external_id: self.external_id.as_deref(),
            credential: &self.credential,
            firmware: self.firmware.as_deref(),
            model: self.model.as_deref(),
            tenant: self.tenant.as_deref(),
            slot: self.device.slot(),
            resume: self.device.resume().filter(|_| self.resumes),
            protocols: Some(SUBPROTOCOL),
        }
    }

    /// Passes waiting commands to the machine.
    pub(super) fn obey(&mut self) {
        let pending = self.commands.take();
        let now = self.context.now();
        self.is_ending |= pending.end;
        self.firmware = pending.firmware;
        if pending.drop_connection {
            self.device.handle_failed(now, &mut self.rng);
            self.device.handle_closed(None, now, &mut self.rng);
        }
        match pending.absence {
            Some(Absence::PowerCut) if self.device.state() == State::Online => self.absence = pending.absence,
            Some(absence) => {
                self.absence = (self.device.state() == State::Online).then_some(absence);
                self.device.handle_restart(Duration::MAX, now);
            }
            None => {}
        }
        if let Some(after) = pending.restart_after {
            self.absence = None;
            self.device.handle_restart(after, now);
        }
    }

    pub(super) fn report(&self, event: Event<'_>) {
        self.context.observer.observe(self.number, event, self.context.now());
    }

    pub(super) async fn until(&self, due: Option<Instant>) {
        match due {
            Some(due) => sleep_until(self.context.at(due)).await,
            None => pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_alone<F>(_: fn(Box<DeviceTask>) -> F) -> usize {
        size_of::<F>()
    }

    fn bytes_with_socket<'a, F>(_: fn(&'a mut DeviceTask, Box<Socket>) -> F) -> usize {
        size_of::<F>()
    }

    /// What an idle session holds of ours, beside the socket's read buffer: a moved value that finds its way into a future
    /// shows here first.
    #[test]
    fn idle_session_is_small() {
        let bytes = bytes_alone(DeviceTask::live) + size_of::<DeviceTask>() + size_of::<Socket>();
        let bytes = bytes + bytes_with_socket(DeviceTask::session);

        assert!(bytes <= 1536, "{bytes} bytes");
    }
}
