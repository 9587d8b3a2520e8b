//! The side of the nodes: links to the coordinator, stages, frames, computing.

use std::time::Duration;

use millrace_shared::id::Epoch;
use millrace_shared::wire::data::{Row, StageTime};

use super::{COORDINATOR, Fault, HEARTBEAT, Happening, Message, Said, World, ms};
use crate::doubt::{Poison, request_of};
use crate::node::{Frame, Stage};

impl World {
    pub(super) fn connect(&mut self, node: usize, life: u64) {
        let n = &mut self.nodes[node];
        if !n.alive || n.life != life || n.linked {
            return;
        }
        n.link += 1;
        n.linked = true;
        let link = n.link;
        self.send(node, COORDINATOR, Message::Hello { link });
        self.at(self.now + HEARTBEAT, Happening::Beat { node, life, link });
    }

    pub(super) fn beat(&mut self, node: usize, life: u64, link: u64) {
        let n = &self.nodes[node];
        if n.alive && n.life == life && n.link == link && n.linked {
            self.send(node, COORDINATOR, Message::FromNode { link, what: Said::Beat });
            self.at(self.now + HEARTBEAT, Happening::Beat { node, life, link });
        }
    }

    pub(super) fn say(&mut self, node: usize, what: Said) {
        if self.nodes[node].linked {
            let link = self.nodes[node].link;
            self.send(node, COORDINATOR, Message::FromNode { link, what });
        }
    }

    pub(super) fn told(&mut self, from: usize, node: usize, message: Message) {
        if !self.nodes[node].alive {
            return;
        }
        let (life, slow) = (self.nodes[node].life, self.nodes[node].slow);
        match message {
            Message::Closed { link }
                if self.nodes[node].link == link && self.nodes[node].linked =>
            {
                self.nodes[node].forget();
                self.at(self.now + ms(250), Happening::Connects { node, life });
            }
            Message::Profile => self.say(node, Said::Profiled),
            Message::Assign(assignment) => {
                let epoch = assignment.epoch;
                let n = &mut self.nodes[node];
                assert!(n.stages.len() < 2, "a node never holds three stages");
                n.stages.push(Stage::new(assignment));
                // An engine of its own.
                n.hung_until = Duration::ZERO;
                let took = ms((50 + self.draw(500)) * u64::from(slow));
                self.at(self.now + took, Happening::Loaded { node, life, epoch });
            }
            Message::Start(epoch) => {
                if let Some(stage) = self.nodes[node].stage(epoch) {
                    stage.started = true;
                    self.say(node, Said::Started(epoch));
                }
            }
            Message::Release(epoch) => {
                self.nodes[node].stages.retain(|s| s.assignment.epoch > epoch);
            }
            Message::Abandon(epoch) => {
                self.nodes[node].stages.retain(|s| s.assignment.epoch != epoch);
            }
            Message::Frame(frame) => self.frame(from, node, frame),
            _ => {}
        }
    }

    pub(super) fn loaded(&mut self, node: usize, life: u64, epoch: Epoch) {
        let n = &mut self.nodes[node];
        if !n.alive || n.life != life {
            return;
        }
        let fails = n.fail_loads > 0;
        n.fail_loads = n.fail_loads.saturating_sub(1);
        let Some(stage) = n.stage(epoch) else { return };
        if fails {
            n.stages.retain(|s| s.assignment.epoch != epoch);
            return self.say(node, Said::LoadFailed(epoch));
        }
        stage.ready = true;
        self.say(node, Said::Ready(epoch));
    }

    pub(super) fn frame(&mut self, from: usize, node: usize, frame: Frame) {
        let now = self.now;
        let limit = self.config.max_in_flight as usize;
        let Some(stage) = self.nodes[node].stage(frame.epoch).filter(|s| s.ready) else {
            self.stale += 1;
            return;
        };
        // Only from whom the plan names.
        let before = stage.assignment.at.checked_sub(1).map(|i| stage.assignment.order[i]);
        assert_eq!(from, before.unwrap_or(COORDINATOR), "a frame came from a stranger");
        stage.queue.push_back((now, frame));
        let rows = stage.queue.iter().filter(|(_, f)| !f.meta.rows.is_empty()).count();
        assert!(rows <= limit, "more micro-batches wait at a stage than may be in flight");
        self.begin(node);
    }

    /// The engine takes the next frame, of whichever stage.
    pub(super) fn begin(&mut self, node: usize) {
        let (now, slow, life) = (self.now, self.nodes[node].slow, self.nodes[node].life);
        let begun: Vec<(Epoch, Duration, usize)> = (self.nodes[node].stages.iter_mut())
            .filter(|s| !s.working)
            .filter_map(|s| {
                let (since, frame) = s.queue.front()?;
                s.working = true;
                Some((s.assignment.epoch, now - *since, frame.tokens.len()))
            })
            .collect();
        for (epoch, wait, positions) in begun {
            let micros = (500 + 100 * positions as u64) * u64::from(slow) + self.draw(200);
            let hangs = self.nodes[node].hung_until.saturating_sub(now);
            let step = Duration::from_micros(micros) + hangs;
            self.at(now + step, Happening::Computed { node, life, epoch, wait, step });
        }
    }

    pub(super) fn computed(&mut self, node: usize, life: u64, epoch: Epoch, time: StageTime) {
        let n = &mut self.nodes[node];
        if !n.alive || n.life != life {
            return;
        }
        let sick = n.sick_steps > 0;
        let Some(stage) = n.stage(epoch) else { return };
        stage.working = false;
        let Some((_, frame)) = stage.queue.pop_front() else { return };
        let poison =
            |row: &Row| self.requests.get(&request_of(row.sequence)).and_then(|r| r.poison);
        let poisons: Vec<Poison> = frame.meta.rows.iter().filter_map(poison).collect();
        if poisons.contains(&Poison::Kills) {
            return self.suffer(Fault::Crash(node, ms(300)));
        }
        let fails = !frame.meta.rows.is_empty() && (sick || poisons.contains(&Poison::Fails));
        let n = &mut self.nodes[node];
        n.sick_steps -= u32::from(fails && sick);
        let Some(stage) = n.stage(epoch) else { return };
        let next = stage.compute(frame, time, fails);
        match stage.assignment.order.get(stage.assignment.at + 1).copied() {
            Some(to) => self.send(node, to, Message::Frame(next)),
            None if !next.meta.rows.is_empty() => {
                self.send(node, COORDINATOR, Message::Results(next));
            }
            None => {}
        }
        self.begin(node);
    }
}
