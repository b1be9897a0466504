"The policy's promises, whatever happens in which order: a pool with a shadow of the truth, driven by Hypothesis"
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kat.cluster.decisions import REASONS
from kat.cluster.groups import Groups
from kat.cluster.places import Costs
from kat.cluster.policy import Scheduler, choose_gang
from kat.cluster.tags import Ask, Device, check_cluster, colocated, disaggregated, multiplexed
from kat.core.io import UserError
from kat.plane.loader import capacity

TAGS = ['train', 'rollout', 'env']


class Pool(RuleBasedStateMachine):
    "Engines that make tokens, a gang that trains, devices that come and go; time is a count of events"
    @initialize(tags=st.lists(st.sets(st.sampled_from(TAGS), min_size=1), min_size=1, max_size=6), data=st.data())
    def set_up(self, tags, data):
        every = [Device(f'd{i}', frozenset(t), data.draw(st.sampled_from([.5, 1, 2])), data.draw(st.integers(1, 3)))
                 for i, t in enumerate([*tags, TAGS])]
        able = sum('train' in d.tags for d in every)
        self.asks = (Ask('train', gang=data.draw(st.integers(0, able))), Ask('rollout'), Ask('env'))
        self.size = data.draw(st.integers(1, 2))
        groups = Groups(data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2)), self.size,
                        data.draw(st.sampled_from(['drop', 'keep'])))
        self.policy = Scheduler(every, groups, self.asks, Costs(patience=5))
        self.devices = {d.name: d for d in every}
        self.up, self.time = set(self.devices), 0
        self.owner, self.loading, self.stopping = {}, set(), {}   # stopping: device -> event at which it was asked
        self.on, self.tokens, self.goal, self.away, self.left = {}, {}, {}, set(), {}  # on: job -> device
        self.gang, self.accepted, self.trained, self.idle, self.waits = None, set(), Counter(), {}, {}
        self.obey(self.policy.start(0))

    def obey(self, decisions):
        for x in decisions:
            getattr(self, type(x).__name__.lower())(x)

    def take(self, x):
        assert x.device in self.up and x.device not in self.owner, 'one owner'
        assert x.tag in self.devices[x.device].tags, 'tags are respected'
        self.owner[x.device] = x.tag
        self.loading.add(x.device)
        self.idle.pop(x.device, None)

    def put(self, x):
        kind = 'env' if x.job[0] == 'env' else 'rollout'
        assert self.owner[x.device] == kind and x.device not in self.loading and x.device not in self.stopping
        assert x.job not in self.on, 'a job runs once'
        assert sum(d == x.device for d in self.on.values()) < self.devices[x.device].slots
        self.away.discard(x.job)
        self.waits.pop(x.job, None)
        self.on[x.job] = x.device
        self.idle.pop(x.device, None)

    def give(self, x):
        assert x.device in self.owner and x.device not in self.stopping
        self.stopping[x.device] = self.time
        self.idle.pop(x.device, None)

    def start(self, x):
        assert self.gang is None and x.devices
        assert not set(x.devices) & set(self.owner), 'all are free when the gang starts'
        assert set(x.devices) <= self.up and all('train' in self.devices[d].tags for d in x.devices)
        asked = self.asks[0].gang
        assert not asked or len(x.devices) == asked, 'all or none'
        assert set(x.groups) <= self.accepted and len(x.groups) == self.policy.groups.batch
        self.gang, self.batch = x.devices, x.groups
        self.owner |= dict.fromkeys(x.devices, 'train')
        for d in x.devices:
            self.idle.pop(d, None)

    def stop(self, x):
        assert {d for d, tag in self.owner.items() if tag == 'train'} == set(x.devices)
        for d in x.devices:
            del self.owner[d]
        self.gang = None

    def begin(self, x):
        self.left[x.group] = self.size
        for i in range(self.size):
            job = (x.group, i)
            self.tokens[job], self.goal[job] = 0, 3 + x.group % 4
            self.away.add(job)

    def cancel(self, x):
        assert self.policy.groups.late == 'drop'
        self.left.pop(x.group)
        self.forget(x.group)

    def forget(self, group):
        for book in (self.tokens, self.goal, self.on, self.waits):
            for job in [job for job in book if job[0] == group]:
                del book[job]
        self.away = {job for job in self.away if job[0] != group}

    def wait(self, x):
        assert x.reason in REASONS and x.device in self.up
        self.idle[x.device] = x.reason

    @rule(data=st.data())
    @precondition(lambda self: self.away)
    def job_is_ready(self, data):
        job = data.draw(st.sampled_from(sorted(self.away, key=str)))
        self.time += 1
        self.away.remove(job)
        self.waits[job] = self.time
        self.obey(self.policy.ready(self.time, job, 'env' if job[0] == 'env' else 'rollout',
                                    None if job[0] == 'env' else job[0], context=self.tokens[job]))

    @rule(name=st.integers(0, 3))
    def a_tool_wants_a_box(self, name):
        job = ('env', name)
        if job not in self.tokens:
            self.tokens[job] = 0
            self.away.add(job)

    @rule(data=st.data(), n=st.integers(1, 3), over=st.booleans())
    @precondition(lambda self: self.on)
    def tokens_are_made(self, data, n, over):
        job = data.draw(st.sampled_from(sorted(self.on, key=str)))
        self.time += 1
        if job[0] == 'env':
            del self.on[job], self.tokens[job]
            self.obey(self.policy.done(self.time, job, last=True))
            return
        n = min(n, self.goal[job] - self.tokens[job])
        self.tokens[job] += n
        if self.tokens[job] < self.goal[job]:
            if over:
                del self.on[job]
                self.away.add(job)
                self.obey(self.policy.done(self.time, job, n))
            return
        del self.on[job]
        self.obey(self.policy.done(self.time, job, n, last=True))
        group = job[0]
        self.left[group] -= 1
        if not self.left[group]:
            assert all(self.tokens[group, i] == self.goal[group, i] for i in range(self.size)), 'no token lost'
            del self.left[group]
            self.forget(group)
            accepted = bool(n % 3)
            if accepted:
                self.accepted.add(group)
            self.obey(self.policy.group_done(self.time, group, accepted))

    @rule(data=st.data())
    @precondition(lambda self: self.loading - set(self.stopping))
    def device_opens(self, data):
        device = data.draw(st.sampled_from(sorted(self.loading - set(self.stopping))))
        self.time += 1
        self.loading.remove(device)
        self.obey(self.policy.opened(self.time, device, 1.0))

    @rule(data=st.data())
    @precondition(lambda self: self.stopping)
    def device_stops(self, data):
        device = data.draw(st.sampled_from(sorted(self.stopping)))
        self.time += 1
        self.leave(device)
        self.obey(self.policy.gave(self.time, device))

    def leave(self, device):
        "Its jobs wait, with their tokens"
        self.stopping.pop(device, None)
        self.loading.discard(device)
        self.owner.pop(device, None)
        for job in [job for job, d in self.on.items() if d == device]:
            del self.on[job]
            self.waits[job] = self.time

    @rule()
    @precondition(lambda self: self.gang)
    def training_ends(self):
        self.time += 1
        for d in self.gang:
            del self.owner[d]
        self.trained.update(self.batch)
        self.gang = None
        self.obey(self.policy.trained(self.time))

    @rule(data=st.data())
    @precondition(lambda self: len(self.up) > 1)
    def device_is_lost(self, data):
        device = data.draw(st.sampled_from(sorted(self.up)))
        self.time += 1
        self.up.remove(device)
        self.leave(device)
        self.idle.pop(device, None)
        self.obey(self.policy.lost(self.time, device))

    @rule(data=st.data())
    @precondition(lambda self: len(self.up) < len(self.devices))
    def device_joins(self, data):
        device = data.draw(st.sampled_from(sorted(set(self.devices) - self.up)))
        self.time += 1
        self.up.add(device)
        self.obey(self.policy.joined(self.time, self.devices[device]))

    @invariant()
    def books_agree(self):
        if not hasattr(self, 'policy'): return
        for name, seat in self.policy.seats.items():
            assert (seat.state != 'down') == (name in self.up)
            assert seat.owner == self.owner.get(name), (name, seat.state)
            assert set(seat.jobs) == {job for job, d in self.on.items() if d == name}
        line = {name for name, job in self.policy.jobs.items() if job.state == 'wait'}
        assert line == set(self.waits), 'no job is forgotten or doubled'
        standing = [job.name for queue in self.policy.line.values() for job, ticket in queue
                    if job.state == 'wait' and job.ticket == ticket]
        assert sorted(standing, key=str) == sorted(line, key=str), 'who waits stands in line, and once'
        for tag in ('rollout', 'env'):
            assert self.policy.waiting[tag] == sum((job[0] == 'env') == (tag == 'env') for job in line)
            assert self.policy.loading[tag] == sum(self.owner[d] == tag for d in self.loading - set(self.stopping))

    @invariant()
    def idle_devices_say_why(self):
        "No device is idle without its reason, and no job waits where a device is open for it"
        if not hasattr(self, 'policy'): return
        for name in self.up:
            busy = name in self.loading or name in self.stopping or name in self.on.values() or \
                self.owner.get(name) == 'train'
            assert busy or name in self.idle, (name, self.policy.seats[name].state)
        for job in self.waits:
            tag = 'env' if job[0] == 'env' else 'rollout'
            if self.policy.loading[tag]: continue   # who loads is left its share
            for name, owner in self.owner.items():
                if owner == tag and name not in self.loading and name not in self.stopping:
                    assert sum(d == name for d in self.on.values()) >= self.devices[name].slots

    @invariant()
    def training_waits_for_a_boundary_only(self):
        if not hasattr(self, 'policy'): return
        if not self.policy.groups.ready or self.gang: return
        able = [s for s in self.policy.seats.values() if 'train' in s.tags and s.name in self.up]
        members = choose_gang(able, self.asks[0])
        assert not members or {s.name for s in self.policy.gang} & set(self.stopping), 'ready, and nobody stops for it'

    @invariant()
    def bound_holds(self):
        if not hasattr(self, 'policy'): return
        assert not self.trained or max(self.trained.values()) == 1, 'a group is trained on once'
        groups = self.policy.groups
        made = groups.trained + len(groups.stored) + len(groups.training)
        assert groups.capacity == capacity(groups.version, groups.staleness, groups.batch, made, len(groups.running))
        if groups.late == 'drop':
            assert all(age <= groups.staleness for ages in groups.ages for age in ages)

    def teardown(self):
        "From anywhere: if all devices come back and each event happens in turn, two updates are made (bounded wait)"
        if not hasattr(self, 'policy'): return
        for device in sorted(set(self.devices) - self.up):
            self.up.add(device)
            self.obey(self.policy.joined(self.time, self.devices[device]))
        goal, rounds = self.policy.groups.version + 2, 0
        while self.policy.groups.version < goal:
            rounds += 1
            assert rounds < 400, self.policy.status()
            self.one_of_each()

    def one_of_each(self):
        self.time += 1
        for device in sorted(self.stopping):
            self.leave(device)
            self.obey(self.policy.gave(self.time, device))
        for device in sorted(self.loading - set(self.stopping)):
            self.loading.remove(device)
            self.obey(self.policy.opened(self.time, device))
        for job in sorted(self.away, key=str):
            if job in self.away:
                self.away.remove(job)
                self.waits[job] = self.time
                self.obey(self.policy.ready(self.time, job, 'env' if job[0] == 'env' else 'rollout',
                                            None if job[0] == 'env' else job[0]))
        for job in sorted(self.on, key=str):
            if job in self.on:
                self.finish(job)
        if self.gang:
            self.training_ends()
        self.books_agree()

    def finish(self, job):
        self.time += 1
        del self.on[job]
        self.obey(self.policy.done(self.time, job, 1, last=True))
        if job[0] == 'env':
            del self.tokens[job]
            return
        self.tokens[job] = self.goal[job]
        self.left[job[0]] -= 1
        if not self.left[job[0]]:
            del self.left[job[0]]
            self.forget(job[0])
            self.accepted.add(job[0])
            self.obey(self.policy.group_done(self.time, job[0]))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=40, deadline=None,
                             suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize('devices, asks, says', [
    (colocated(2), (Ask('train', gang=0), Ask('rollout'), Ask('reward')), 'reward asks for the tag reward'),
    (multiplexed(8, 2), (Ask('train', gang=4), Ask('rollout')), 'train is a gang of 4 devices, and 2 of 8'),
    ([*colocated(1), *colocated(1)], (Ask('train', gang=0), Ask('rollout')), 'two of the name d0000'),
    ([], (Ask('train', gang=0),), 'a cluster without devices'),
    (colocated(1), (Ask('rollout'),), 'exactly one kind of work is a gang'),
    (colocated(1), (Ask('train', gang=0),), 'no work asks for the tag rollout'),
    (colocated(1), (Ask('train', gang=0, memory_gb=200), Ask('rollout')), 'and no device has all of it')])
def test_what_could_never_run_is_refused_in_a_line(devices, asks, says):
    with pytest.raises(UserError, match=says) as refused:
        check_cluster(devices, asks)
    assert '\n' not in str(refused.value)
    with pytest.raises(UserError):
        Scheduler(devices, Groups(1, 0), asks)


@pytest.mark.parametrize('wrong', [
    lambda: Device('a', set()), lambda: Device('a', {'train'}, speed=0), lambda: Device('a', {'train'}, slots=0),
    lambda: Device('a', {'train'}, speed=float('nan')), lambda: Device('a', 'train'), lambda: Device('a', {''}),
    lambda: Device('a', {'train'}, slots=1.5), lambda: Groups(1.5, 0), lambda: Costs(crowd=0), lambda: Costs(take=-1),
    lambda: disaggregated(4, 4), lambda: multiplexed(4, 5),
    lambda: multiplexed(4, 0), lambda: Groups(0, 0), lambda: Groups(1, -1), lambda: Groups(1, 0, late='later'),
    lambda: Ask('train', gang=-1), lambda: Ask('train', gang=1, scaling=0)])
def test_facts_that_cant_be_are_refused(wrong):
    with pytest.raises(UserError):
        wrong()


def test_a_partial_goes_before_new_jobs_and_a_turn_goes_home():
    policy = Scheduler(disaggregated(3, 1, slots=2), Groups(1, 9), costs=Costs())
    policy.start(0)
    for job in range(4):
        policy.ready(0, job, group=job + 1)
    puts = policy.opened(1, 'd0001') + policy.opened(1, 'd0002')
    where = {x.job: x.device for x in puts if hasattr(x, 'job')}
    assert len(where) == 4
    first = next(job for job in where if where[job] == 'd0001')
    policy.lost(2, 'd0001')
    freed = next(job for job in where if where[job] == 'd0002')
    put = policy.done(3, freed)[0]
    assert (put.job, put.device, put.moved) == (first, 'd0002', True)


def test_nobody_waits_for_ever_behind_those_who_are_at_home():
    policy = Scheduler(disaggregated(2, 1, slots=1), Groups(3, 0), costs=Costs(patience=35, crowd=3))
    policy.start(0)
    for job in 'abc':
        policy.ready(0, job, group=ord(job) - 96)
    policy.opened(1, 'd0001')                  # a runs; b and c wait, and have never been anywhere
    seen = []
    for time in range(10, 80, 10):             # whoever ran comes back at once, to its keys and values
        now = next(iter(policy.seats['d0001'].jobs))
        policy.done(time, now, 10)
        policy.ready(time, now)
        seen += policy.seats['d0001'].jobs
    assert seen[:3] == ['b', 'a', 'b'] and 'c' in seen[3:5], seen


def test_who_left_the_line_for_its_home_stands_at_the_end_when_it_comes_back():
    "Its old place, between others, isn't kept for it"
    policy = Scheduler(disaggregated(2, 1, slots=1), Groups(1, 0), costs=Costs(patience=30))
    policy.start(0)
    policy.ready(0, 'a')
    policy.opened(1, 'd0001')
    policy.ready(2, 'b')
    policy.done(3, 'a')     # a and b have their keys and values here now; c and d never had
    policy.ready(5, 'c')
    policy.ready(6, 'a')
    served = [policy.done(7, 'b')[0].job]       # home goes first: a leaves its place between c and d
    policy.ready(8, 'd')
    policy.ready(8, 'b')
    served.append(policy.done(9, 'a')[0].job)
    policy.ready(10, 'a')
    served.append(policy.done(45, 'b')[0].job)  # all have waited too long to be passed over, d longer than a
    served.append(policy.done(46, 'c')[0].job)
    assert served == ['a', 'b', 'c', 'd']


@pytest.mark.parametrize('seconds, lent', [(.1, True), (1000, False)])
def test_a_device_is_lent_only_if_that_pays(seconds, lent):
    policy = Scheduler(multiplexed(2, 1, slots=4), Groups(4, 1), costs=Costs(take=seconds, back=seconds))
    policy.start(0)
    for job in range(8):
        policy.ready(0, job, group=job + 1)
    for device in ('d0000', 'd0001'):   # nothing is known yet of the pace: both roll out
        policy.opened(1, device)
    for job in range(5):
        policy.done(10*job + 10, job, 100, last=True)
        policy.group_done(10*job + 10, job + 1)
    policy.gave(51, 'd0000')
    policy.trained(60)
    mine = policy.status()[0]
    assert (mine['state'], mine['reason']) == (('load', None) if lent else ('free', 'lending'))
