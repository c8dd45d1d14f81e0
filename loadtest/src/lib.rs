//! Load tests for Seawall: scenarios run against real processes over real sockets, and the parts that the demo shares.
//!
//! A scenario ([`scenario::Scenario`]) is read and checked first; [`run::run`] starts the servers it asks for, drives
//! the fleets through its phases, and returns a [`report::Report`], which [`threshold`] judges.
//!
//! Nothing here depends on the gateway's code: it is started, watched and judged from outside, like any other program.

pub mod baseline;
pub mod bench;
pub mod compare;
pub mod demo;
pub mod drift;
pub mod exit;
pub mod fleet;
pub mod follow;
pub mod generator;
pub mod guard;
pub mod harm;
pub mod html;
pub mod junit;
pub mod metrics;
pub mod naive;
pub mod phases;
pub mod plan;
pub mod postgres;
pub mod preflight;
pub mod process;
pub mod programs;
pub mod progress;
pub mod recorder;
pub mod report;
pub mod run;
pub mod scenario;
pub mod server;
pub mod signals;
pub mod simulate;
pub mod slow;
pub mod storage;
pub mod summary;
pub mod target;
pub mod threshold;
