//! docs/CONFIG.md, made from the sections.
